"""The load of padded blocks against draws, and what it makes of a step's price and bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.load import busiest_load, padded_load, wire_load
from piper_hpc.resource_model.topology import Group
from piper_hpc.spec import Layout, ModelSpec, Routing, Topology, Workload
from tests.resource_model.clusters import TINY, cluster

MODEL = ModelSpec(
    "m", layers=2, hidden=64, heads=2, kv_heads=2, head_dim=32, experts=16, top_k=2, expert_ffn=64, vocab=64
)
HOT = (0.25, *(0.75 / 15,) * 15)


@pytest.mark.parametrize("histogram", [(), HOT], ids=["even", "hot"])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_padded_load_is_what_draws_give(histogram: tuple[float, ...], tokens: int) -> None:
    shares = np.array(histogram or (1 / 16,) * 16)
    drawn = np.random.default_rng(0).multinomial(2 * tokens, shares, size=(200, 8))
    rows = padded_load(MODEL, Routing(histogram=histogram), tokens, ep=8) * 2 * tokens / 16
    assert rows == pytest.approx(float(np.median(drawn.max(axis=(1, 2)))), rel=0.03, abs=1.5)


def test_a_block_is_no_longer_than_all_tokens() -> None:
    assert padded_load(MODEL, Routing(imbalance=8.0), 16, ep=8) <= 8.0


def test_ranks_that_share_a_card_bring_their_mean_to_it() -> None:
    """Four times the mean's rows on one of eight ranks, two to a node: a card carries (4 + 4 / 7) / 2 of the mean."""
    spread_out, inside = Group((0, 1, 0, 2, 4)), Group((0, 7))
    unknown = cluster()
    assert wire_load(4.0, spread_out, unknown) == pytest.approx((4 + 4 / 7) / 2)
    assert wire_load(1.0, spread_out, unknown) == pytest.approx(1.0)
    assert wire_load(4.0, inside, unknown) == 4.0
    own = replace(unknown, topology=Topology(node=2, ranks_per_nic=1))
    assert wire_load(4.0, spread_out, own) == pytest.approx(4.0)


def test_padding_costs_time_and_bytes() -> None:
    workload, machine = Workload(8, 16), cluster()
    flat, padded = (Layout(ep=machine.ranks, micro_batch=1, all_to_all=name) for name in ("flat", "flat_padded"))
    load = busiest_load(TINY, padded, workload)
    assert load > 1 == busiest_load(TINY, flat, workload)
    plain, filled = (predict(TINY, machine, layout, workload) for layout in (flat, padded))
    assert filled.step_time_s > plain.step_time_s and filled.terms["expert_s"] > plain.terms["expert_s"]
    assert max(filled.peak_memory_bytes) > max(plain.peak_memory_bytes)
    for level, sent in plain.exchange["payload_bytes"].items():
        assert filled.exchange["payload_bytes"][level] == pytest.approx(load * sent)
    assert {stage["algorithm"] for stage in filled.exchange["stages"]} == {"flat_padded"}
