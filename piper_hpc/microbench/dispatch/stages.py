"""What `make bench-a2a` measures: machines of the testbed, and on each the cells and the algorithms in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from piper_hpc.microbench.dispatch.cells import Cell, Variant
from piper_hpc.microbench.dispatch.rank import Part

EXPERTS, TOP_K, TOKENS, HIDDEN = 64, 8, 512, 512
CHUNKS = (1, 2, 4, 8)
ITERATIONS = 40
SIZES = ((4, 8), (4, 32), (4, 128), (4, 512), (16, 512), (64, 512), (256, 512))
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


def part(cells: Sequence[Cell], variants: Sequence[Variant], budget_s: float, iterations: int) -> Part:
    """The part as its ranks are told."""
    return Part([asdict(each) for each in cells], [asdict(each) for each in variants], iterations, budget_s)


FLAT, FLAT_DEDUP, MPI = Variant("flat"), Variant("flat_dedup", 1), Variant("mpi")
HALO, HALO3, HALO3_DEDUP = Variant("halo", 4), Variant("halo3", 4), Variant("halo3_dedup", 8)
HALO_DEDUP = {chunks: Variant("halo_dedup", chunks) for chunks in CHUNKS}
SWEPT = [FLAT, FLAT_DEDUP, HALO_DEDUP[1], HALO_DEDUP[8]]
SWEPT_ITERATIONS = 16
"""Of small cells, which would fill their share with many more: the large ones, a few iterations each, take the rest."""

NIC_MBIT_PER_S = {2: 150.0, 4: 120.0}
"""By ranks of a node: so slow that flat, with the share of a core that a rank has, still fills four fifths of it."""

PERIOD_US = {2: 5000.0, 4: 10000.0}
"""Of the quota: the shortest that the kernel takes for a rank's share, as ranks wait for one another all the time."""


def swept(*workloads: str, below: int = 2**40) -> list[Cell]:
    """1 KiB to 4 MiB a rank, small ones first: what they leave of the time goes to the large ones."""
    cells = [cell(name, tokens=tokens, hidden=hidden) for tokens, hidden in SIZES for name in workloads]
    return [each for each in cells if each.logical_bytes < below]


def stages(scale: float = 1.0) -> list[Stage]:
    """The whole benchmark. scale: of every budget, 1 for about a quarter of an hour in all."""

    def options(ranks_per_node: int, **more: float) -> dict[str, float]:
        rate, period_us = NIC_MBIT_PER_S[ranks_per_node], PERIOD_US[ranks_per_node]
        chosen = {"nodes": 4, "ranks_per_node": ranks_per_node, "racks": 1, "nic_mbit_per_s": rate}
        return chosen | {"period_us": period_us} | more

    def timed(cells: Sequence[Cell], variants: Sequence[Variant], budget_s: float) -> Part:
        return part(cells, variants, scale * budget_s, SWEPT_ITERATIONS if variants is SWEPT else ITERATIONS)

    in_chunks = list(HALO_DEDUP.values())
    best = HALO_DEDUP[8]
    return [
        Stage(
            "4x2",
            options(2),
            [
                timed([cell("W0")], [FLAT, FLAT_DEDUP, HALO, *in_chunks, MPI], 80),
                timed([cell("W2")], [FLAT, HALO_DEDUP[4], best, MPI], 75),
                timed(swept("W0", "W2"), SWEPT, 100),
                timed([cell(load, top_k=k) for load in ("W0", "W2") for k in (2, 4)], [FLAT, best], 45),
                timed([cell(load, tokens=256) for load in ("W1", "W3", "W4", "W5", "W6", "W7")], [FLAT, best], 65),
            ],
        ),
        Stage(
            "4x4",
            options(4),
            [
                timed([cell("W0")], [FLAT, FLAT_DEDUP, *in_chunks, MPI], 115),
                timed([cell("W2")], [FLAT, HALO_DEDUP[4], best, MPI], 130),
                timed(swept("W0"), SWEPT, 60),
                timed(swept("W2", below=2**21), SWEPT, 25),
                timed([cell("W0", top_k=k) for k in (2, 4)], [FLAT, best], 35),
            ],
        ),
        Stage(
            "4x2, 2 racks",
            options(2, racks=2, rack_mbit_per_s=NIC_MBIT_PER_S[2] / 2),
            [
                timed([cell("W0")], [FLAT, HALO, HALO3, best, HALO3_DEDUP], 95),
                timed([cell("W2")], [best, HALO3_DEDUP], 30),
            ],
            mpi=False,
        ),
    ]


def smoke() -> list[Stage]:
    """One small cell, for a test of the whole way."""
    options = {"nodes": 2, "ranks_per_node": 2, "racks": 1, "nic_mbit_per_s": NIC_MBIT_PER_S[2]}
    return [Stage("2x2", options, [part([cell("W0", tokens=32)], [FLAT, HALO_DEDUP[4]], 4.0, 4)], mpi=False)]
