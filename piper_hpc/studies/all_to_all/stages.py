"""What `make bench-a2a` measures: machines of the testbed, and on each the cells and the algorithms in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from piper_hpc.microbench.dispatch.cells import Cell, Variant
from piper_hpc.studies.all_to_all.rank import Part

EXPERTS, TOP_K, TOKENS, HIDDEN = 64, 8, 512, 512
ITERATIONS = 10
"""At most, of cells from 1 MiB on: the quicker ones would fill their share with many more, and the others need it."""
SMALL_ITERATIONS = 16
"""Of small cells, which take milliseconds that vary by half."""
SMALL = ((4, 8), (4, 32), (4, 128), (4, 512), (16, 512))
LARGE = ((64, 512), (256, 512))
"""(tokens, hidden) of 1 KiB to 4 MiB a rank, as T k d w of float32."""


@dataclass(frozen=True)
class Stage:
    """One machine: options of the testbed as its flags have them, and the parts measured there, one after the other."""

    name: str
    options: dict[str, float]
    parts: list[Part] = field(default_factory=list)
    mpi: bool = True


def cell(workload: str, *, top_k: int = TOP_K, tokens: int = TOKENS, hidden: int = HIDDEN) -> Cell:
    """A cell of the benchmark's 64 experts, in float32."""
    return Cell(workload, EXPERTS, top_k, tokens, hidden)


def part(cells: Sequence[Cell], variants: Sequence[Variant], budget_s: float, iterations: int = ITERATIONS) -> Part:
    """The part as its ranks are told."""
    return Part([asdict(each) for each in cells], [asdict(each) for each in variants], iterations, budget_s)


FLAT, FLAT_DEDUP, MPI = Variant("flat"), Variant("flat_dedup", 1), Variant("mpi")
HALO, HALO3, HALO3_DEDUP = Variant("halo", 4), Variant("halo3", 4), Variant("halo3_dedup", 8)
HALO_DEDUP = {chunks: Variant("halo_dedup", chunks) for chunks in (1, 2, 4, 8)}
BEST = HALO_DEDUP[8]
PHASES = [replace(BEST, overlap="none"), replace(BEST, overlap="own_first")]
"""Beside the usual order, V2 of Algorithm 1 (arXiv 2605.05049), its V0 and V1."""

NIC_MBIT_PER_S = {2: 110.0, 4: 140.0}
"""By ranks of a node: so slow that flat, with the share of a core that a rank has, still fills four fifths of it."""

PERIOD_US = {2: 5000.0, 4: 10000.0}
"""Of the quota: the shortest that the kernel takes for a rank's share, as ranks wait for one another all the time."""


def swept(sizes: Sequence[tuple[int, int]], *workloads: str) -> list[Cell]:
    """One cell for every size and workload."""
    return [cell(name, tokens=tokens, hidden=hidden) for tokens, hidden in sizes for name in workloads]


def stages(scale: float = 1.0) -> list[Stage]:
    """The whole benchmark: loads and sizes first of all, then what chunks, phases and a third level do.

    scale: of every budget, 1 for about eighteen minutes in all. Where a round takes seconds, the members of the family
    that stay far behind are left out, so that the others get enough iterations: without deduplication two levels send
    what flat does.
    """

    def options(ranks_per_node: int, **more: float) -> dict[str, float]:
        rate, period_us = NIC_MBIT_PER_S[ranks_per_node], PERIOD_US[ranks_per_node]
        chosen = {"nodes": 4, "ranks_per_node": ranks_per_node, "racks": 1, "nic_mbit_per_s": rate}
        return chosen | {"period_us": period_us} | more

    def timed(
        cells: Sequence[Cell], variants: Sequence[Variant], budget_s: float, iterations: int = ITERATIONS
    ) -> Part:
        return part(cells, variants, scale * budget_s, iterations)

    every = [FLAT, FLAT_DEDUP, HALO, HALO_DEDUP[1], BEST]
    others = ("W1", "W3", "W4", "W5", "W6", "W7")
    return [
        Stage(
            "4x2",
            options(2),
            [
                timed([cell("W0")], [FLAT, BEST, MPI], 48),
                timed([cell("W2")], [FLAT, BEST, MPI], 72),
                timed(swept(SMALL, "W0", "W2"), every, 60, SMALL_ITERATIONS),
                timed(swept(LARGE, "W0", "W2"), [FLAT, FLAT_DEDUP, HALO_DEDUP[1], BEST], 80),
                timed([cell("W0", tokens=192)], [FLAT, HALO, *HALO_DEDUP.values(), *PHASES], 34),
                timed([cell(load, top_k=k) for load in ("W0", "W2") for k in (2, 4)], [FLAT, BEST], 52),
                timed([cell(load, tokens=128) for load in others], [FLAT, BEST], 45),
            ],
        ),
        Stage(
            "4x4",
            options(4),
            [
                timed([cell("W0")], [FLAT, BEST, MPI], 72),
                timed([cell("W2")], [FLAT, BEST, MPI], 120),
                timed(swept(SMALL, "W0", "W2"), every, 70, SMALL_ITERATIONS),
                timed(swept(LARGE, "W0", "W2"), [FLAT, HALO_DEDUP[1], BEST], 100),
                timed([cell("W0", top_k=k) for k in (2, 4)], [FLAT, BEST], 42),
                timed([cell(load, tokens=32) for load in others], [FLAT, BEST], 30),
            ],
        ),
        Stage(
            "4x2, 2 racks",
            options(2, racks=2, rack_mbit_per_s=NIC_MBIT_PER_S[2] / 2),
            [
                timed([cell("W0", tokens=128)], [FLAT, HALO, HALO3], 27),
                timed([cell(load, tokens=256) for load in ("W0", "W2")], [FLAT, BEST, HALO3_DEDUP], 80),
            ],
            mpi=False,
        ),
    ]


def smoke() -> list[Stage]:
    """One small cell, for a test of the whole way."""
    options = {"nodes": 2, "ranks_per_node": 2, "racks": 1, "nic_mbit_per_s": NIC_MBIT_PER_S[2]}
    return [Stage("2x2", options, [part([cell("W0", tokens=32)], [FLAT, HALO_DEDUP[4]], 4.0)], mpi=False)]
