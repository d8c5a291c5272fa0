"""The all-to-all family in words and numbers that what executes it, what times it and what predicts it share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ALGORITHMS = ("flat", "halo", "halo3", "flat_dedup", "halo_dedup", "halo3_dedup")
"""What Layout.all_to_all may name, beside `auto`."""

AUTO = "auto"
"""What the measured cluster, or else the cost model, finds fastest for the group, size, top_k and load."""

INDEX_BYTES = 4
"""A choice's row among those of its message, int32; its expert follows from the counts."""

WEIGHT_BYTES = 4
"""A choice's weight, float32 where nobody says otherwise; it travels in the type that it has."""

DISPATCH_COMBINE = "dispatch_combine"
"""Operator of a row, curve or fit: a dispatch and its combine by one algorithm of the family."""

CHUNKS = 4
"""Parts in which rows between nodes travel where nobody says otherwise, so that one part's way inside the node runs
beside the next's outside."""

Overlap = Literal["none", "own_first", "far_first"]
"""Order in which phases 1-3 of Algorithm 1 (arXiv 2605.05049) are posted. none: one after the other; own_first: phase 1
(the own node's rows), then 2 and 3 beside it; far_first: phase 2 before 1 and 3."""

OVERLAP: Overlap = "far_first"
"""Where nobody says otherwise: the slowest links begin first."""

OVERLAPS: dict[Overlap, str] = {"none": "V0", "own_first": "V1", "far_first": "V2"}
"""The paper's names of them."""

LEVELS = ("node", "rack", "system")
"""Links by what they join: ranks of a node, nodes of a rack, racks."""

MOVES_PER_STEP = 4
"""Times that a plan is carried out in a step of training: dispatch and combine, forward and backward."""

METADATA_BYTES = INDEX_BYTES + WEIGHT_BYTES
"""Of each choice that shares its row with others."""


@dataclass(frozen=True)
class ExchangeCell:
    """What one group asks of a dispatch and its combine.

    ranks, nodes, racks: of the group; logical_bytes: top_k copies of all tokens of one rank, T k d w; row_bytes: of
    one row, d w; experts: of the whole group; imbalance: rows that the busiest rank sends or receives, over the mean.
    Raises ValueError for sizes that are not above 0, and an imbalance below 1.
    """

    ranks: int
    nodes: int
    racks: int
    logical_bytes: float
    row_bytes: float
    top_k: int
    experts: int
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        if not (self.logical_bytes > 0 and self.row_bytes > 0 and self.imbalance >= 1):
            raise ValueError(f"{self}: logical_bytes and row_bytes must be above 0, imbalance at least 1")


@dataclass(frozen=True, kw_only=True)
class MeasuredExchange(ExchangeCell):
    """What one algorithm of the family took in a cell: a dispatch and its combine, forward, from (tokens, expert ids,
    weights) to combined tokens, counts exchange included.

    seconds: median over the iterations of the slowest rank; spread: half the 5-95 % range over it, dimensionless;
    chunks: parts in which rows travelled between nodes, 0 where the algorithm has none or nobody said. Raises
    ValueError for seconds that are not above 0.
    """

    algorithm: str
    seconds: float
    spread: float = 0.0
    chunks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0:
            raise ValueError(f"{self}: seconds must be above 0")
