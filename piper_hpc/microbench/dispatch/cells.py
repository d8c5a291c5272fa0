"""Cells of the dispatch benchmark: one workload of one size, measured with every algorithm; and its result rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from piper_hpc.spec import BENCHMARK_VERSION, DISPATCH_COMBINE, OVERLAP, Overlap
from piper_hpc.spec.routing_workloads import BURST_STEPS, ROTATION_STEPS, imbalance

Row = dict[str, Any]
"""Of `measurements.jsonl`."""

STEPS = 2
"""Of a workload, which are drawn once in a cell: drawing takes a rank with a share of a core as long as exchanging."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Cell:
    """One load. tokens: of a mean rank; dtype: of the rows, float32, bfloat16 or float16."""

    workload: str
    experts: int
    top_k: int
    tokens: int
    hidden: int
    dtype: str = "float32"

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        return self.hidden * ITEM_BYTES[self.dtype]

    @property
    def logical_bytes(self) -> int:
        """What a mean rank's choices weigh: T k d w, whatever an algorithm really sends of it."""
        return self.tokens * self.top_k * self.row_bytes

    def step(self, iteration: int) -> int:
        """The workload's step that an iteration times: a few in turn, each by one iteration of either half (see `row`);
        of W6 each of another block, of W7 bursts alone."""
        place = iteration // 2 % STEPS
        if self.workload == "W6":
            return place * ROTATION_STEPS
        return place if self.workload != "W7" else place * BURST_STEPS + BURST_STEPS - 1


@dataclass(frozen=True)
class Variant:
    """An algorithm as it is timed. algorithm: of spec.ALGORITHMS, or `mpi`; chunks: see AllToAllConfig; overlap: order
    of its phases."""

    algorithm: str
    chunks: int = 0
    overlap: Overlap = OVERLAP


@dataclass(frozen=True)
class CheckResult:
    """What one call of a variant sends, and whether its result is right. All bytes are of the cell's first step.

    payload_bytes, metadata_bytes: of all ranks in one dispatch, by the widest link that they cross;
    between_nodes_bytes: payload of one dispatch from node to node, [nodes][nodes]; link_bytes: what left each node by
    its link in one dispatch and combine, empty where it was not read.
    """

    payload_bytes: dict[str, float]
    metadata_bytes: dict[str, float]
    between_nodes_bytes: Sequence[Sequence[float]]
    link_bytes: Sequence[float]
    correct: bool


def row(
    cell: Cell,
    variant: Variant,
    group: Mapping[str, int],
    samples_s: Sequence[float],
    checked: CheckResult,
    **extra: Any,
) -> Row:
    """One row of `measurements.jsonl`.

    group: its ranks, nodes and racks; samples_s: of the slowest rank, by iteration. bytes_by_level: payload of a mean
    rank in one dispatch, by the widest link (node: inside one, rack: between nodes of a rack, system: between racks).
    The even samples are for calibration where the odd ones are held out for judging it: statistics are those of all,
    `calibration_s` and `held_out_s` the medians of each half. Rows of CPU ranks also have `computed_s` and `idle_s`,
    the medians of what a mean rank computes in a call and is idle (`piper_hpc.microbench.timing.Spent`), and
    `core_share`, what of a core a busy rank has. `cell` names the row for a run that resumes this one.
    """
    seconds = np.asarray(samples_s, dtype=np.float64)
    p5, median, p95 = np.percentile(seconds, [5, 50, 95])
    ranks = group["ranks"]
    return {
        "benchmark_version": BENCHMARK_VERSION,
        "operator": DISPATCH_COMBINE,
        "algorithm": variant.algorithm,
        "chunks": variant.chunks,
        "overlap": variant.overlap,
        **asdict(cell),
        "group": dict(group),
        "cell": name_of(cell, variant, group),
        "logical_bytes_per_rank": cell.logical_bytes,
        "row_bytes": cell.row_bytes,
        "bytes_by_level": {level: total / ranks for level, total in checked.payload_bytes.items()},
        "metadata_bytes_by_level": {level: total / ranks for level, total in checked.metadata_bytes.items()},
        "bytes_between_nodes": [list(line) for line in checked.between_nodes_bytes],
        "link_bytes_by_node": list(checked.link_bytes),
        "imbalance": imbalance(
            cell.workload,
            experts=cell.experts,
            top_k=cell.top_k,
            ranks=ranks,
            tokens=cell.tokens,
            step=cell.step(0),
        ),
        "n": len(seconds),
        "median_s": float(median),
        "mean_s": float(seconds.mean()),
        "p5_s": float(p5),
        "p95_s": float(p95),
        "min_s": float(seconds.min()),
        "max_s": float(seconds.max()),
        "spread": float((p95 - p5) / 2 / median),
        "calibration_s": float(np.median(seconds[::2])),
        "held_out_s": float(np.median(seconds[1::2])) if len(seconds) > 1 else None,
        "samples_s": [float(sample) for sample in seconds],
        "correct": checked.correct,
        **extra,
    }


def name_of(cell: Cell, variant: Variant, group: Mapping[str, int]) -> str:
    """What tells a row from all others of a run."""
    facts = (*asdict(variant).values(), *group.values(), *asdict(cell).values())
    return "/".join(("dispatch", *map(str, facts)))
