"""What `make bench-a2a` measures: machines of the testbed, and on each the cells and the algorithms in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from piper_hpc.microbench.dispatch.cells import Cell, Variant
from piper_hpc.microbench.dispatch.rank import Part

EXPERTS, TOP_K, TOKENS, HIDDEN = 64, 8, 512, 512
CHUNKS = (1, 2, 4, 8)
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


def part(cells: Sequence[Cell], variants: Sequence[Variant], budget_s: float, iterations: int = 40) -> Part:
    """The part as its ranks are told."""
    return Part([asdict(each) for each in cells], [asdict(each) for each in variants], iterations, budget_s)


FLAT, FLAT_DEDUP, MPI = Variant("flat"), Variant("flat_dedup", 1), Variant("mpi")
HALO, HALO_DEDUP = Variant("halo", 4), Variant("halo_dedup", 4)
HALO3, HALO3_DEDUP = Variant("halo3", 4), Variant("halo3_dedup", 4)
IN_CHUNKS = [Variant("halo_dedup", chunks) for chunks in CHUNKS]
SWEPT = [FLAT, FLAT_DEDUP, Variant("halo", 1), HALO, Variant("halo_dedup", 1), HALO_DEDUP]

ACCEPTANCE = [cell("W0"), cell("W2")]
SWEEP = [cell(workload, tokens=tokens, hidden=hidden) for workload in ("W0", "W2") for tokens, hidden in SIZES]
LOADS = [cell(workload) for workload in ("W1", "W3", "W4", "W5", "W6", "W7")]
CHOICES = [cell(workload, top_k=top_k) for workload in ("W0", "W2") for top_k in (2, 4)]

NIC_MBIT_PER_S = 200.0


def stages(scale: float = 1.0) -> list[Stage]:
    """The whole benchmark. scale: of every budget, 1 for about fifteen minutes in all."""
    two = {"nodes": 4, "ranks_per_node": 2, "racks": 1, "nic_mbit_per_s": NIC_MBIT_PER_S}
    four = two | {"ranks_per_node": 4}
    racks = two | {"racks": 2, "rack_mbit_per_s": NIC_MBIT_PER_S / 2}

    def of(budget_s: float) -> float:
        return scale * budget_s

    return [
        Stage(
            "4x2",
            two,
            [
                part(ACCEPTANCE, [FLAT, FLAT_DEDUP, HALO, *IN_CHUNKS, MPI], of(150)),
                part(SWEEP, SWEPT, of(110)),
                part(CHOICES, [FLAT, HALO_DEDUP], of(60)),
                part(LOADS, [FLAT, FLAT_DEDUP, HALO, HALO_DEDUP], of(100)),
            ],
        ),
        Stage(
            "4x4",
            four,
            [
                part(ACCEPTANCE, [FLAT, FLAT_DEDUP, HALO, *IN_CHUNKS, MPI], of(200)),
                part(SWEEP, SWEPT, of(130)),
                part(CHOICES, [FLAT, HALO_DEDUP], of(60)),
            ],
        ),
        Stage(
            "4x2, 2 racks",
            racks,
            [part(ACCEPTANCE, [FLAT, HALO, HALO3, HALO_DEDUP, HALO3_DEDUP], of(90))],
            mpi=False,
        ),
    ]


def smoke() -> list[Stage]:
    """One small cell, for a test of the whole way."""
    options = {"nodes": 2, "ranks_per_node": 2, "racks": 1, "nic_mbit_per_s": NIC_MBIT_PER_S}
    return [Stage("2x2", options, [part([cell("W0", tokens=32)], [FLAT, HALO_DEDUP], 4.0, 4)], mpi=False)]
