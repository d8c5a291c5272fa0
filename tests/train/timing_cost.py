"""What timing every step costs on the default run (model=tiny, PP2 x EP2): `python -m tests.train.timing_cost`.

Two trainers on the same ranks take steps in turn, one timed, one not; each pair of steps meets the same other work.
"""

from __future__ import annotations

import time
from statistics import median

import torch
import torch.distributed as dist

from piper_hpc.config import Experiment
from piper_hpc.spec import RankMap
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.presets import experiment
from tests.processes import run_ranks

PAIRS = 150
WARMUP = 10


class Tokens:
    """The same random bytes at every step."""

    def __init__(self, sequences: int, sequence: int) -> None:
        self.tokens = torch.randint(256, (sequences, sequence + 1), generator=torch.Generator().manual_seed(0))

    def batch(self, first_sample: int) -> torch.Tensor:
        return self.tokens


def step_times(asked: Experiment) -> list[tuple[float, float]]:
    """Seconds of (timed, untimed) steps with their records, pair by pair and each first in turn, on this rank."""
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
    found = []
    for pair in range(WARMUP + PAIRS):
        taken_s = [0.0, 0.0]
        for which in (0, 1) if pair % 2 else (1, 0):
            dist.barrier()
            begun_s = time.perf_counter()
            trainers[which].step(data, 0, 1e-3, sample_memory=False)
            trainers[which].record()
            taken_s[which] = time.perf_counter() - begun_s
        found.append((taken_s[0], taken_s[1]))
    return found[WARMUP:]


def main() -> None:
    """Print medians and the median of the ratio within a pair."""
    asked = experiment()
    assert asked.layout is not None
    pairs = run_ranks(asked.layout.ranks, step_times, asked, timeout_s=600.0)[0]
    timed_s, untimed_s = (median(each) for each in zip(*pairs, strict=True))
    ratio = median(timed / untimed for timed, untimed in pairs)
    print(
        f"{asked.model.name}, {asked.layout.name()}: {1e3 * timed_s:.1f} ms timed, {1e3 * untimed_s:.1f} ms not; "
        f"timing costs {100 * (ratio - 1):.1f} % (median of {len(pairs)} pairs)"
    )


if __name__ == "__main__":
    main()
