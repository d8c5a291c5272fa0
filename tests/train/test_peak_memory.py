"""Peak memory of real ranks of a pipeline, against what the eager engine says of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from piper_hpc.profiling.memory import LiveBytes
from piper_hpc.resource_model.eager.memory import peak_bytes
from piper_hpc.spec import Layout, RankMap, Workload
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks
from tests.resource_model.clusters import TINY

WORKLOAD = Workload(global_batch=16, sequence=128)
LAYOUTS = [
    Layout(pp=2, micro_batch=2),
    Layout(pp=2, micro_batch=2, schedule="gpipe"),
    Layout(pp=2, vpp=2, micro_batch=2, schedule="interleaved", recompute="activation"),
    Layout(pp=2, micro_batch=2, schedule="zb_h1", recompute="attention"),
    Layout(pp=2, vpp=2, micro_batch=2, schedule="zbv"),
    Layout(pp=2, vpp=2, micro_batch=2, schedule="dualpipev"),
    Layout(pp=2, micro_batch=2, recompute="full"),
]


class Tokens:
    """The same random bytes at every step."""

    def __init__(self) -> None:
        shape = (WORKLOAD.global_batch, WORKLOAD.sequence + 1)
        self.tokens = torch.randint(TINY.vocab, shape, generator=torch.Generator().manual_seed(0))

    def batch(self, first_sample: int) -> torch.Tensor:
        return self.tokens


def measured_peaks(layouts: list[Layout]) -> list[int]:
    """Peak of live tensor bytes of this rank in the second step of each layout."""
    return [measured_peak(layout) for layout in layouts]


def measured_peak(layout: Layout) -> int:
    """Peak of live tensor bytes of this rank in the second step."""
    with LiveBytes() as others:
        pass
    trainer = Trainer(
        TINY,
        layout,
        WORKLOAD,
        TrainSettings(steps=2, collective_timeout_s=30.0),
        rank_map=RankMap.block(layout, layout.ranks, (0,)),
        device=torch.device("cpu"),
    )
    data, rate = Tokens(), 1e-3
    for sample_memory in (False, True):
        trainer.step(data, 0, rate, sample_memory=sample_memory)
    dist.barrier()
    return trainer.peak_memory_bytes - others.live_bytes


@pytest.mark.processes
def test_peak_of_every_rank_of_a_pipeline() -> None:
    by_rank = run_ranks(2, measured_peaks, LAYOUTS)
    for index, layout in enumerate(LAYOUTS):
        measured = [peaks[index] for peaks in by_rank]
        assert peak_bytes(TINY, layout, WORKLOAD) == pytest.approx(measured, rel=0.03), layout.name()
