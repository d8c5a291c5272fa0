"""Rows of dispatch and combine, grouped into cells; ratios of what was timed in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from piper_hpc.cluster.calibration import measured_all_to_all
from piper_hpc.spec import DISPATCH_COMBINE, OVERLAP, OVERLAPS, AllToAllConfig, MeasuredAllToAll

HELD_OUT = slice(1, None, 2)
"""Iterations that no calibration sees: the odd ones."""


@dataclass(frozen=True)
class TimedVariant:
    """One variant in one cell, from its row."""

    row: dict[str, Any]

    @property
    def algorithm(self) -> str:
        """Of the family, or mpi."""
        return str(self.row["algorithm"])

    @property
    def chunks(self) -> int:
        """0 where it has none."""
        return int(self.row["chunks"])

    @property
    def config(self) -> AllToAllConfig:
        """What was timed."""
        return AllToAllConfig(self.algorithm, self.chunks)

    @property
    def name(self) -> str:
        """For tables."""
        return str(self.config) if self.default_overlap else f"{self.config} {OVERLAPS[self.row['overlap']]}"

    @property
    def default_overlap(self) -> bool:
        """Whether its phases are in the order that runs take."""
        return str(self.row["overlap"]) == OVERLAP

    @property
    def median_s(self) -> float:
        """Over all iterations."""
        return float(self.row["median_s"])

    @property
    def spread(self) -> float:
        """Half the 5-95 % range over the median."""
        return float(self.row["spread"])

    @property
    def between_nodes(self) -> np.ndarray:
        """Payload bytes of one dispatch from node to node, [nodes, nodes], zero on the diagonal."""
        matrix = np.array(self.row["bytes_between_nodes"])
        np.fill_diagonal(matrix, 0.0)
        return matrix

    @property
    def payload_bytes(self) -> float:
        """Between nodes, of a mean rank in one dispatch."""
        return float(sum(self.row["bytes_by_level"][level] for level in ("rack", "system")))

    @property
    def metadata_bytes(self) -> float:
        """Bytes of row indices and weights between nodes, of a mean rank in one dispatch."""
        return float(sum(self.row["metadata_bytes_by_level"][level] for level in ("rack", "system")))

    @property
    def wire_s(self) -> float:
        """The least seconds of a dispatch and combine: payload through the busiest link, each way what it is shaped to.

        A combine sends back what a dispatch brought, so both take equally long at least.
        """
        matrix, rates = self.between_nodes, self.row["link_bytes_per_s"]
        busiest = max(matrix.sum(0).max(), matrix.sum(1).max()) / rates["nic"]
        if self.row["group"]["racks"] > 1:
            half = len(matrix) // self.row["group"]["racks"]
            rack = np.arange(len(matrix)) // half
            crossing = matrix * (rack[:, None] != rack[None, :])
            for number in range(self.row["group"]["racks"]):
                inside = rack == number
                busiest = max(busiest, max(crossing[inside].sum(), crossing[:, inside].sum()) / rates["rack"])
        return float(2 * busiest)

    @property
    def link_overhead(self) -> float | None:
        """Bytes that left the nodes by their link over payload, in dispatch and combine; None where not read."""
        link, matrix = self.row["link_bytes_by_node"], self.between_nodes
        return float(sum(link) / (2 * matrix.sum())) if link and matrix.sum() else None

    def faster_than(self, other: TimedVariant, held_out: bool = True) -> tuple[float, float, float]:
        """(median, p5, p95) of the other's seconds over this one's, iteration by iteration."""
        part = HELD_OUT if held_out else slice(None)
        ratios = np.array(other.row["samples_s"])[part] / np.array(self.row["samples_s"])[part]
        p5, median, p95 = np.percentile(ratios, [5, 50, 95])
        return float(median), float(p5), float(p95)

    def all_to_all(self, *, held_out: bool) -> MeasuredAllToAll:
        """As the calibration has it, from one half of its iterations."""
        half = "held_out_s" if held_out else "calibration_s"
        return replace(measured_all_to_all(self.row), seconds=self.row[half])


@dataclass(frozen=True)
class MeasuredCell:
    """One cell on one machine: its variants in the order they were measured."""

    machine: str
    workload: str
    top_k: int
    logical_bytes: int
    row_bytes: int
    variants: tuple[TimedVariant, ...]

    @property
    def label(self) -> str:
        """For tables, without the machine."""
        return f"{self.workload} k={self.top_k}"

    def of(self, algorithm: str) -> TimedVariant | None:
        """The variant of an algorithm that is quickest in the calibration half; None where it was not measured."""
        found = [timed for timed in self.variants if timed.algorithm == algorithm and timed.default_overlap]
        return min(found, key=lambda timed: timed.row["calibration_s"], default=None)

    @property
    def family(self) -> list[TimedVariant]:
        """The variants that `auto` may select."""
        return [timed for timed in self.variants if timed.algorithm != "mpi" and timed.default_overlap]

    def named(self, name: str) -> TimedVariant | None:
        """The variant of this name."""
        return next((timed for timed in self.variants if timed.name == name), None)


def cells(rows: Iterable[dict[str, Any]]) -> list[MeasuredCell]:
    """All cells of a run, in the order they were measured; other operators' rows are left out."""
    grouped: dict[tuple[Any, ...], list[TimedVariant]] = defaultdict(list)
    for row in rows:
        if row["operator"] == DISPATCH_COMBINE and row.get("machine"):
            key = (row["machine"], row["workload"], row["top_k"], row["logical_bytes_per_rank"], row["row_bytes"])
            grouped[key].append(TimedVariant(row))
    return [
        MeasuredCell(machine, workload, top_k, logical, row, tuple(variants))
        for (machine, workload, top_k, logical, row), variants in grouped.items()
    ]


def machines(measured: Sequence[MeasuredCell]) -> list[str]:
    """Their names, in order."""
    return list(dict.fromkeys(cell.machine for cell in measured))
