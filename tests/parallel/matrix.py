"""What training combines on eight ranks, cell by cell: schedules, ZeRO, recomputation, all-to-alls; and a cover."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from piper_hpc.spec import Layout, RankMap
from piper_hpc.spec.executor import trains
from piper_hpc.spec.schedules import SCHEDULES

NODES = {"pp2_ep4": Layout(pp=2, ep=4), "pp2_ep2_dp2": Layout(pp=2, ep=2, dp=2)}
RANKS = 8
RANKS_PER_NODE = 2

AXES = (
    tuple(NODES),
    SCHEDULES,
    (0, 1),
    ("none", "attention+activation", "full"),
    ("flat", "halo_dedup"),
    ("float32", "bfloat16"),
)


@dataclass(frozen=True)
class Cell:
    """One combination. Two ranks a node, so that an expert group of four has both levels of a hierarchy."""

    shape: str
    schedule: str
    zero: int
    recompute: str
    all_to_all: str
    dtype: str

    @property
    def layout(self) -> Layout:
        """Two chunks a rank where the schedule has several."""
        base = NODES[self.shape]
        vpp = 2 if self.schedule in ("interleaved", "zbv", "dualpipev") else 1
        return Layout(
            pp=base.pp, ep=base.ep, dp=base.dp, vpp=vpp, zero=self.zero, schedule=self.schedule,
            recompute=self.recompute, all_to_all=self.all_to_all,
        )  # fmt: skip

    @property
    def rank_map(self) -> RankMap:
        """Two ranks a node, all nodes in one rack."""
        return RankMap.block(self.layout, RANKS_PER_NODE, (0,) * (RANKS // RANKS_PER_NODE))

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.shape}-{self.schedule}-zero{self.zero}-{self.recompute}-{self.all_to_all}-{self.dtype}"


def every_cell() -> list[Cell]:
    """All combinations that the executor trains."""
    return [cell for values in product(*AXES) if trains((cell := Cell(*values)).layout)]


def pairwise_cover(cells: Sequence[Cell]) -> list[Cell]:
    """A few of `cells` that hold every pair of values which any of them holds: greedily, the most new pairs first."""
    missing = {pair for cell in cells for pair in _pairs(cell)}
    chosen = []
    while missing:
        best = max(cells, key=lambda cell: len(missing.intersection(_pairs(cell))))
        missing.difference_update(_pairs(best))
        chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> Iterator[tuple[tuple[int, object], ...]]:
    return combinations(enumerate(vars(cell).values()), 2)
