"""The exchange model: what its formula says, that a fit finds the constants back, and how predictions use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.eager.all_to_all import (
    LEAST_ROWS,
    AllToAllModel,
    cost_terms,
    fit_all_to_all_model,
    judge,
    of_links,
)
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import ALGORITHMS, AllToAllCell, Layout, MeasuredAllToAll, Routing, Workload
from tests.resource_model.clusters import TINY, calibration, cluster

KIB = 1024.0
MODEL = AllToAllModel(
    call_s=9e-3, exchange_s=7e-4, message_s=2e-5, plan_s=1.2e-2, node_s_per_byte=4e-9, rack_s_per_byte=4e-8,
    system_s_per_byte=8e-8, copy_s_per_byte=1e-8, serial=0.5, beside=2.5,
)  # fmt: skip
FREE = AllToAllModel(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def cell(size: float = 1024 * KIB, *, top_k: int = 8, imbalance: float = 1.0, shape: tuple[int, int, int] = (8, 4, 2),
         row_bytes: float = 2 * KIB, experts: int = 64) -> AllToAllCell:  # fmt: skip
    return AllToAllCell(*shape, size, row_bytes, top_k, experts, imbalance)


def rows(model: AllToAllModel, noise: float = 0.0) -> list[MeasuredAllToAll]:
    """Every algorithm on a grid of cells, timed by `model`."""
    generator = np.random.default_rng(0)
    cells = [
        cell(size * KIB, top_k=top_k, imbalance=imbalance)
        for size in (16, 64, 256, 1024, 4096, 8192)
        for top_k in (2, 8)
        for imbalance in (1.0, 4.0)
    ]
    return [
        MeasuredAllToAll(
            **vars(each), algorithm=name, seconds=model.seconds(name, each) * np.exp(noise * generator.normal())
        )
        for each in cells
        for name in ALGORITHMS
    ]


def test_flat_takes_the_link_that_fills_longest_both_ways() -> None:
    """Eight ranks on four nodes in two racks: of 1 MiB, 3/4 leave the node and 1/2 the rack."""
    mib = 1024 * KIB
    asked = cell(mib)
    assert replace(FREE, rack_s_per_byte=1e-6).seconds("flat", asked) == pytest.approx(2 * 0.75 * mib * 1e-6)
    assert replace(FREE, system_s_per_byte=1e-6).seconds("flat", asked) == pytest.approx(2 * 0.5 * mib * 1e-6)
    both = replace(FREE, rack_s_per_byte=1e-6, system_s_per_byte=2e-6)
    assert both.seconds("flat", asked) == pytest.approx(2 * 1.0 * mib * 1e-6)
    # The hot rank gets four times the mean, so its node 4 + 4/7 of eight shares, from three nodes of two ranks.
    assert replace(FREE, rack_s_per_byte=1e-6).seconds("flat", cell(mib, imbalance=4.0)) == pytest.approx(
        2 * 3 * (4 + 4 / 7) / 8 * mib * 1e-6
    )


def test_hops_follow_one_another_in_chunks() -> None:
    """Two hops of equal length: one part takes both, c parts overlapped take (1 + 1/c), not overlapped both again."""
    onward = cost_terms("halo", cell()).hops[1, 0]
    outside = cost_terms("halo", cell()).hops[0, 1]
    even = replace(FREE, node_s_per_byte=1 / onward, rack_s_per_byte=1 / outside, serial=0.0)
    own = cost_terms("halo", cell()).local_bytes / onward
    assert even.seconds("halo", cell(), 1) == pytest.approx(2 * (2 + own))
    assert even.seconds("halo", cell(), 4) == pytest.approx(2 * (1 + (1 + own) / 4))
    assert replace(even, serial=1.0).seconds("halo", cell(), 4) == pytest.approx(2 * (2 + own))


def test_backward_exchanges_no_counts() -> None:
    fixed = replace(FREE, exchange_s=1.0)
    assert fixed.seconds("flat", cell()) == 3
    assert fixed.seconds("flat", cell(), with_plan=False) == 2
    assert fixed.seconds("halo_dedup", cell(), 1) - fixed.seconds("halo_dedup", cell(), 1, with_plan=False) == 3


@given(st.sampled_from(list(ALGORITHMS)), st.floats(1.0, 1e5), st.floats(1.0, 8.0), st.sampled_from([1, 2, 8]),
       st.sampled_from([(1, 1, 1), (4, 1, 1), (8, 4, 2), (8, 8, 2), (16, 4, 1), (64, 8, 4)]))  # fmt: skip
def test_more_bytes_and_more_imbalance_never_take_less_time(
    algorithm: str, kib: float, imbalance: float, top_k: int, shape: tuple[int, int, int]
) -> None:
    def seconds(factor: float, imbalance: float) -> float:
        return MODEL.seconds(algorithm, cell(kib * KIB * factor, top_k=top_k, imbalance=imbalance, shape=shape))

    assert seconds(2.0, 1.0) >= seconds(1.0, 1.0) > 0
    if not ALGORITHMS[algorithm].dedup:  # tokens that meet at one rank share rows
        assert seconds(1.0, imbalance) >= seconds(1.0, 1.0) * (1 - 1e-12)


def test_a_fit_finds_the_constants_back() -> None:
    found = fit_all_to_all_model(rows(MODEL))
    assert found.measured and judge(found, rows(MODEL)).worst < 0.01
    for name in ("call_s", "exchange_s", "plan_s", "rack_s_per_byte", "system_s_per_byte"):
        assert getattr(found, name) == pytest.approx(getattr(MODEL, name), rel=0.05), name


def test_a_fit_to_noisy_rows_predicts_sizes_that_it_never_saw() -> None:
    noisy = rows(MODEL, noise=0.1)
    seen = {16 * KIB, 256 * KIB, 4096 * KIB}
    found = fit_all_to_all_model([row for row in noisy if row.logical_bytes in seen])
    unseen = [row for row in rows(MODEL) if row.logical_bytes not in seen]
    assert judge(found, unseen).mean < 0.06
    assert 0.1 < found.spread < 0.25, "1.645 standard deviations of 0.1"
    low, high = found.intervals["rack_s_per_byte"]
    assert low < MODEL.rack_s_per_byte < high
    assert judge(replace(found, rack_s_per_byte=10 * found.rack_s_per_byte), unseen).mean > 0.5, (
        "a judge can find fault"
    )


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ResourceModelError, match=f"measure at least {LEAST_ROWS}"):
        fit_all_to_all_model(rows(MODEL)[: LEAST_ROWS - 1])


def test_without_measured_exchanges_the_links_make_the_model() -> None:
    made = of_links(Curves(cluster(), 4))
    assert not made.measured and made.rack_s_per_byte == pytest.approx(1e-9) and made.serial == made.beside == 1.0
    with pytest.raises(ResourceModelError, match="has no p2p curve"):
        of_links(Curves(cluster(calibration("p2p/node", "p2p/rack", "p2p/system")), 4))


def run(all_to_all: str, exchanges: tuple[MeasuredAllToAll, ...] = (), imbalance: float = 1.0):  # type: ignore[no-untyped-def]
    where = cluster(replace(calibration(), exchanges=exchanges))
    workload = Workload(global_batch=32, sequence=128, routing=Routing(imbalance=imbalance))
    return predict(TINY, where, Layout(ep=8, micro_batch=4, all_to_all=all_to_all), workload)


def test_flat_is_predicted_by_its_curves_whatever_was_measured_of_the_family() -> None:
    assert run("flat", tuple(rows(MODEL))).terms == run("flat").terms
    assert run("flat").exchange["stages"][0]["algorithm"] == "flat"


def test_other_algorithms_are_flat_times_the_models_ratio() -> None:
    flat, found = (run(name, tuple(rows(MODEL))) for name in ("flat", "halo_dedup"))
    for term, seconds in found.terms.items():
        assert (seconds != flat.terms[term]) == (term in ("dispatch_s", "combine_s")), term
    assert "dispatch_combine" in found.calibration["rests_on"]["dispatch_s"]
    assert not any("scaled by a cost model" in note for note in found.notes)
    assert found.exchange["model"]["measured"] and "model" not in flat.exchange
    assert any("scaled by a cost model of its links" in note for note in run("halo_dedup").notes)


def test_auto_is_predicted_as_what_it_takes_and_says_why() -> None:
    table = tuple(rows(MODEL))
    auto = run("auto", table)
    taken = auto.exchange["stages"][0]
    assert auto.terms == run(taken["algorithm"], table).terms and auto.layout.all_to_all == "auto"
    assert any(note.startswith(f"all_to_all=auto: {taken['algorithm']} for 8 ranks on 4 nodes") for note in auto.notes)
    assert "by the cost model" in run("auto").exchange["stages"][0]["why"]


def test_the_bytes_of_a_step_are_those_of_its_layers_and_micro_batches() -> None:
    """4 layers, 8 ranks, one micro-batch of 512 tokens with 2 choices of 512 B; dispatch, combine and back."""
    sent = run("flat").exchange["payload_bytes"]
    all_rows = 4 * 8 * 4 * 512 * 2 * 512
    assert sent == pytest.approx({"node": all_rows / 8, "rack": all_rows / 4, "system": all_rows / 2})
