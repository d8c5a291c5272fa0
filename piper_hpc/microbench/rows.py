"""Rows of `measurements.jsonl`: every suite fills them in one way, on rank 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from piper_hpc.microbench.timing import Team, Timing
from piper_hpc.spec import BENCHMARK_VERSION, RankMap

Row = dict[str, Any]
OnRow = Callable[[Row], None]


@dataclass(frozen=True)
class RowWriter:
    """Writes the rows of a suite, on rank 0.

    node_names, rack_names: by index of node and rack; by default names are the indices.
    """

    team: Team
    ranks: RankMap
    dtype: torch.dtype
    on_row: OnRow
    node_names: Sequence[str] = ()
    rack_names: Sequence[str] = ()

    def write(
        self,
        operator: str,
        work: float,
        unit: str,
        shape: dict[str, int],
        timing: Timing,
        wrong: int,
        ranks: Sequence[int],
        statistic: str = "median",
        **extra: Any,
    ) -> None:
        """Hand one row to rank 0's caller; every rank calls this.

        wrong: how many wrong values this rank saw in its first call; statistic: what a curve is to follow.
        """
        wrong_values = int(self.team.table([float(wrong)]).sum())
        if self.team.rank != 0:
            return
        nodes = list(dict.fromkeys(self.ranks.node_of_rank[rank] for rank in ranks))
        racks = list(dict.fromkeys(self.ranks.rack_of_node[node] for node in nodes))
        self.on_row(
            {
                "benchmark_version": BENCHMARK_VERSION,
                "operator": operator,
                "work": work,
                "unit": unit,
                "shape": shape,
                "dtype": str(self.dtype).removeprefix("torch."),
                **timing.statistics(),
                "statistic": statistic,
                "ranks": list(ranks),
                "nodes": [self.node_names[node] if self.node_names else str(node) for node in nodes],
                "racks": [self.rack_names[rack] if self.rack_names else str(rack) for rack in racks],
                "correct": wrong_values == 0,
                "wrong": wrong_values,
                **extra,
            }
        )


def percentiles(timing: Timing) -> dict[str, Any]:
    """What a row of a wide suite says of its repeats beside `Timing.statistics`: seconds of the slowest rank or group.

    `p99_s` is the nearest rank, so it equals the largest below 100 samples; `cv`: standard deviation over mean.
    """
    slowest = timing.samples.max(axis=0)
    return {
        "samples_s": [float(seconds) for seconds in slowest],
        "p99_s": float(np.percentile(slowest, 99, method="inverted_cdf")),
        "cv": float(slowest.std() / slowest.mean()),
    }
