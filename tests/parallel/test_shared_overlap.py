"""Shared experts beside the exchange of routed rows: what runs while rows are on their way, and that no bit changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.channel import Work
from piper_hpc.model.layer import LayerSettings, MoELayer
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Layout, ModelSpec, RankMap, Recompute
from piper_hpc.spec.expert_placement import ExpertPlacement
from tests.parallel.test_parity import Outcome, dataset, train_rank
from tests.processes import run_ranks

MODEL = ModelSpec(
    "shared", layers=4, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=2, expert_ffn=16, vocab=64,
    router_aux_coef=0.1, shared_experts=1, shared_expert_ffn=24, shared_expert_gate=True,
)  # fmt: skip
LAYOUTS = [
    Layout(pp=2, vpp=2, ep=2, micro_batch=2, schedule="zbv"),
    Layout(ep=4, micro_batch=2, all_to_all="halo_dedup", recompute="full"),
    Layout(ep=4, micro_batch=2, all_to_all="halo"),
    Layout(ep=2, dp=2, micro_batch=2, zero=1),
]


class Told:
    """A channel of one rank that tells when an all-to-all of rows is posted, and when it is waited for."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        output.copy_(source)
        self.told = source.is_floating_point()
        self.events += ["post"] * self.told
        return self

    def wait(self) -> None:
        self.events += ["wait"] * self.told


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("overlap", [True, False])
def test_what_runs_while_rows_are_on_their_way(overlap: bool, recompute: str) -> None:
    events: list[str] = []
    settings = LayerSettings(
        sequence=4,
        aux_scale=0.0,
        dispatcher=FlatDispatcher.over(Told(events), 1),
        recorder=Recorder(CpuClock()),
        recompute=Recompute.parse(recompute),
        device=torch.device("cpu"),
        dtype=torch.float32,
        overlap_shared=overlap,
    )
    layer = MoELayer(MODEL, 0, settings, ExpertPlacement.linear(MODEL.experts, 1))
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert layer.shared is not None
    layer.shared.register_forward_hook(lambda *_: events.append("shared"))
    layer.shared.register_full_backward_hook(lambda *_: events.append("shared"))
    layer.experts.register_forward_hook(lambda *_: events.append("experts"))
    hidden = torch.randn(2, 4, MODEL.hidden, requires_grad=True)
    result = layer(hidden)
    dispatched = ["post", "shared", "wait"] if overlap else ["post", "wait", "shared"]
    forward = [*dispatched, "experts", "post", "wait"]
    assert events == forward
    events.clear()
    result.sum().backward()
    again = forward if recompute == "full" else []
    returned = ["post", "shared", "wait"] if overlap else ["shared", "post", "wait"]
    assert events == [*again, "post", "wait", *returned]


def train_both(layout: Layout, path: Path) -> list[Outcome]:
    """Two steps on this rank, without and with overlap, by the same weights and samples."""
    rank_map = RankMap.block(layout, 2, (0,) * (layout.ranks // 2))
    data = dataset(path, layout, dist.get_rank())
    return [
        train_rank(MODEL, replace(layout, overlap_shared=overlap), data, "float32", 2, rank_map)
        for overlap in (False, True)
    ]


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda each: f"{each.name()}-{each.all_to_all}-{each.recompute}")
def test_losses_and_gradients_are_the_same_bit_for_bit(layout: Layout, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(bytes(range(64)) * 40)
    found: list[Any] = run_ranks(layout.ranks, train_both, layout, path)
    for without, overlapped in found:
        assert overlapped.losses == without.losses and overlapped.norms == without.norms
        assert overlapped.gradients.keys() == without.gradients.keys() != set()
        for name, gradient in without.gradients.items():
            assert torch.equal(gradient, overlapped.gradients[name]), name
