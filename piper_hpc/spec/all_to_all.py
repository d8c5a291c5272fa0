"""All-to-all algorithms: their one registry, and the numbers that executing, timing and predicting them share.

An all-to-all is one dispatch (tokens to the ranks of their experts) or one combine (expert outputs back to their
tokens) of an expert group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Domain = Literal["rack", "node", "rank"]
"""What an algorithm takes ranks together by."""


@dataclass(frozen=True)
class Algorithm:
    """One all-to-all algorithm: what executes it, prices it and compares it is derived from these fields.

    name: as configuration and records have it. domains: nested domains, widest first, that a row enters one after the
    other: one hop among the domains of each kind, and a last one among the ranks inside the narrowest; none: a single
    hop among all ranks. dedup: a token enters each of these domains once, however many of its experts are there; what
    comes back for it is added up before it leaves. padded: every source sends every expert as many rows as the largest
    of these blocks has. dispatcher: "module:attribute" that makes the executing object, see
    `piper_hpc.comm.factory.Build`; a name, as this package imports no torch.
    """

    name: str
    domains: tuple[Domain, ...] = ()
    dedup: bool = False
    padded: bool = False
    dispatcher: str = "piper_hpc.comm.halo:HaloDispatcher"

    @property
    def levels(self) -> int:
        """Hops that cross links, 1 to 3: inside a rank nothing is sent."""
        return 1 + sum(domain != "rank" for domain in self.domains)


FLAT = Algorithm("flat", dispatcher="piper_hpc.comm.flat:FlatDispatcher.build")
"""One uneven all-to-all among all ranks: the reference of every other algorithm, in results and in time."""

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        FLAT,
        # HALO, Algorithm 1 of arXiv 2605.05049; `halo3` has one more level.
        Algorithm("halo", ("node",)),
        Algorithm("halo3", ("rack", "node")),
        # Deduplicated by level, as in arXiv 2508.09591.
        Algorithm("flat_dedup", ("rank",), dedup=True),
        Algorithm("halo_dedup", ("node",), dedup=True),
        Algorithm("halo3_dedup", ("rack", "node"), dedup=True),
    )
}
"""What Layout.all_to_all may name, beside `auto`, by name; in this order wherever they are listed."""

BASELINES: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (Algorithm("flat_padded", padded=True, dispatcher="piper_hpc.comm.padded:PaddedDispatcher.build"),)
}
"""What others do: trained and priced to be compared with, never searched, benchmarked or chosen."""


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of this name. Raises ValueError for a name that is neither in ALGORITHMS nor in BASELINES."""
    found = ALGORITHMS.get(name) or BASELINES.get(name)
    if found is None:
        raise ValueError(f"all_to_all={name}: must be one of {', '.join(ALGORITHMS)}, for example flat")
    return found


AUTO = "auto"
"""What the measured cluster, or else the cost model, finds fastest for the group, size, top_k and load."""

INDEX_BYTES = 4
"""A choice's row among those of its message, int32; its expert follows from the counts."""

WEIGHT_BYTES = 4
"""A choice's weight, float32 where nobody says otherwise; it travels in the type that it has."""

DISPATCH_COMBINE = "dispatch_combine"
"""Operator of a row, curve or fit: a dispatch and its combine by one algorithm of the family."""

CHUNKS = 4
"""Parts in which rows between domains are sent where nobody says otherwise, so that one part's hop inside the node
overlaps the next part's hop between nodes."""

Overlap = Literal["none", "own_first", "far_first"]
"""Order in which phases 1-3 of Algorithm 1 (arXiv 2605.05049) are posted. none: one after the other; own_first: phase 1
(the own node's rows), then 2 and 3 beside it; far_first: phase 2 before 1 and 3."""

OVERLAP: Overlap = "far_first"
"""Where nobody says otherwise: the slowest links begin first."""

OVERLAPS: dict[Overlap, str] = {"none": "V0", "own_first": "V1", "far_first": "V2"}
"""The paper's names of them."""

LEVELS = ("node", "rack", "system")
"""Links by what they join: ranks of a node, nodes of a rack, racks."""

ALL_TO_ALLS_PER_STEP = 4
"""Of one layer and micro-batch in a step of training: dispatch and combine, forward and backward."""

METADATA_BYTES = INDEX_BYTES + WEIGHT_BYTES
"""Of each choice that shares its row with others."""


def reach_probability(held: float | npt.NDArray[np.float64], experts: int, top_k: int) -> npt.NDArray[np.float64]:
    """Probability that a token has at least one of its experts in a domain that holds `held` of all `experts`.

        P = 1 - prod over i = 0 ... k - 1 of max(0, 1 - held / (E - i))

    held: any shape, also fractional; the result has its shape. Exact for k distinct experts drawn uniformly: the
    product is C(E - held, k) / C(E, k), the hypergeometric probability to draw none. For a domain that gets a share p
    of all choices take held = p E: then draw i + 1 hits it with p / (1 - i/E), as if the i experts drawn before were
    of mean popularity, which is an approximation. Of N equal domains, N P / k is r(N), the share of rows that
    deduplication leaves (arXiv 2508.09591).
    """
    missed: npt.NDArray[np.float64] = np.float64(1.0)
    for drawn in range(top_k):
        missed = missed * np.maximum(0.0, 1 - held / (experts - drawn))
    return 1 - missed


@dataclass(frozen=True, order=True)
class AllToAllConfig:
    """How an expert group does its dispatches and combines. algorithm: a name of ALGORITHMS; chunks: parts in which
    rows between domains are sent, 0: the algorithm has none, or takes CHUNKS; overlap: of its phases."""

    algorithm: str
    chunks: int = 0
    overlap: Overlap = OVERLAP

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.chunks}" if self.chunks else self.algorithm


@dataclass(frozen=True)
class AllToAllCell:
    """A dispatch and its combine as one group needs them, whatever the algorithm: a point at which algorithms compare.

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
class MeasuredAllToAll(AllToAllCell):
    """Measured seconds of one algorithm in a cell: a dispatch and its combine, forward, from (tokens, expert ids,
    weights) to combined tokens, all-to-all of the counts included.

    seconds: median over the iterations of the slowest rank, of CPU ranks of a mean one that computes at the share of a
    core that a busy rank has; spread: half the 5-95 % range over it, dimensionless; chunks: as in AllToAllConfig, 0
    also where nobody recorded them; idle_s: in which a CPU rank waits for others or the wire, 0 where that was not
    measured. Raises ValueError for seconds that are not above 0.
    """

    algorithm: str
    seconds: float
    spread: float = 0.0
    chunks: int = 0
    idle_s: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.seconds > 0:
            raise ValueError(f"{self}: seconds must be above 0")

    @property
    def config(self) -> AllToAllConfig:
        """What was timed."""
        return AllToAllConfig(self.algorithm, self.chunks)
