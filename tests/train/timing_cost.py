"""What timing every step costs on the default run (model=tiny, PP2 x EP2): `python -m tests.train.timing_cost`.

Two trainers on the same ranks take steps in turn, one timed, one not; each pair of steps meets the same other work.
Wall-clock time means something on a quiet machine alone; the processor time of all ranks is what timing itself takes.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.config import Experiment
from piper_hpc.spec import RankMap
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.presets import experiment
from tests.processes import run_ranks

PAIRS = 60
WARMUP = 10


class Tokens:
    """The same random bytes at every step."""

    def __init__(self, sequences: int, sequence: int) -> None:
        self.tokens = torch.randint(256, (sequences, sequence + 1), generator=torch.Generator().manual_seed(0))

    def batch(self, first_sample: int) -> torch.Tensor:
        return self.tokens


def step_times(asked: Experiment) -> np.ndarray:
    """Seconds of steps with their records on this rank, [pairs, (timed, untimed), (wall clock, processor)].

    Each of a pair goes first in turn.
    """
    layout, workload = asked.layout, asked.workload
    assert layout is not None
    data = Tokens(workload.global_batch // layout.dense_dp, workload.sequence)
    trainers = [
        Trainer(
            asked.model,
            layout,
            workload,
            TrainSettings(steps=1, timing=timing, collective_timeout_s=60.0),
            rank_map=RankMap.block(layout, layout.ranks, (0,)),
            device=torch.device("cpu"),
        )
        for timing in (True, False)
    ]
    taken_s = np.zeros((WARMUP + PAIRS, 2, 2))
    for pair in range(WARMUP + PAIRS):
        for which in (0, 1) if pair % 2 else (1, 0):
            dist.barrier()
            begun_s = np.array([time.perf_counter(), time.process_time()])
            trainers[which].step(data, 0, 1e-3, sample_memory=False)
            trainers[which].record()
            taken_s[pair, which] = np.array([time.perf_counter(), time.process_time()]) - begun_s
    return taken_s[WARMUP:]


def main() -> None:
    """Print medians, and the median of the ratio within a pair, of the wall clock and of the processors' time."""
    asked = experiment()
    assert asked.layout is not None
    by_rank = np.array(run_ranks(asked.layout.ranks, step_times, asked, timeout_s=600.0))
    print(f"{asked.model.name}, {asked.layout.name()}, medians of {PAIRS} pairs:")
    for name, pairs in (("wall clock", by_rank[0, :, :, 0]), ("processors", by_rank[..., 1].sum(axis=0))):
        timed_ms, untimed_ms = 1e3 * np.median(pairs, axis=0)
        cost = np.median(pairs[:, 0] / pairs[:, 1]) - 1
        print(f"{name}: {timed_ms:.1f} ms a step timed, {untimed_ms:.1f} ms not; timing costs {100 * cost:.1f} %")


if __name__ == "__main__":
    main()
