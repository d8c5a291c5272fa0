"""What a step's row costs on rank 0 with 256 ranks, 61 layers and 256 experts: `python -m tests.train.record_cost`."""

from __future__ import annotations

import time
from statistics import median

import numpy as np

from piper_hpc.spec import Layout
from piper_hpc.train.metrics import summarise
from piper_hpc.train.record import OWN_SENDS, Records, RecordShape

REPEATS = 50


def random_records(layout: Layout, *, micro_batches: int, layers: int, experts: int) -> Records:
    """Records of all ranks, whose counts and times are random and whose waits are all for own sends."""
    shape = RecordShape.of(layout, micro_batches, layers=layers, experts=experts)
    random, ranks = np.random.default_rng(0), np.zeros(layout.ranks, shape.dtype)
    ranks["end_s"] = 1.0 + random.random(layout.ranks)
    ranks["expert_tokens"] = random.integers(1, 100, ranks["expert_tokens"].shape)
    ranks["waits"]["kind"] = OWN_SENDS
    return Records(shape, ranks)


def main() -> None:
    """Print the time of `summarise`, for an even share of layers and for ranks that hold all of them.

    The least of many: other work on the machine can only add.
    """
    for layout in (Layout(pp=8, ep=32), Layout(ep=64, dp=4)):
        records = random_records(layout, micro_batches=32, layers=61, experts=256)
        taken_s = []
        for _ in range(REPEATS):
            begun_s = time.perf_counter()
            summarise(records, layout, tokens=1)
            taken_s.append(time.perf_counter() - begun_s)
        mb = records.ranks.nbytes / 1e6
        least_ms, median_ms = 1e3 * min(taken_s), 1e3 * median(taken_s)
        print(f"{layout.name()}: {least_ms:.2f} ms a row (median {median_ms:.2f}), {mb:.1f} MB gathered")


if __name__ == "__main__":
    main()
