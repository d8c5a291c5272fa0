"""What one dispatch and its combine ask of a machine: bytes through its links, collectives, messages, bytes copied.

Every number is that of the rank, node or rack that has most to do, since all others wait for it. The group is uniform
(W ranks on N nodes in Q racks) and the routing is that of one hot rank, which gets `imbalance` times the mean while the
others share the rest equally. Hops: arXiv 2605.05049, Algorithm 1; rows left by deduplication: `reach_probability`,
with the popularity of each domain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import CHUNKS, LEVELS, METADATA_BYTES, Algorithm, AllToAllCell, get_algorithm, reach_probability

HOPS = 3
"""The most hops a row takes: between racks, between nodes, inside a node."""

LINKS = LEVELS
"""Links that a hop loads: those inside a node (bytes to its other ranks), a node's way out (bytes that leave the node,
wherever they go) and a rack's (bytes that leave the rack)."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CostTerms:
    """The terms that AllToAllModel multiplies with its constants; of one dispatch and combine, or of many, [...].

    hops [..., HOPS, LINKS]: bytes that one rank's share of a link carries in each hop of the dispatch, without
    `local_bytes`, those of rows for the own node, which overlap; both are sent twice, in dispatch and in combine.
    chunks: parts of the rows that follow one another through the hops; collectives, messages: collectives posted, and
    messages of them to peers; plans: deduplicated levels, each of which is planned apart; copied_bytes: packed and
    unpacked, in dispatch and in combine.
    """

    hops: Array
    local_bytes: Number
    chunks: Number
    collectives: Number
    messages: Number
    plans: Number
    copied_bytes: Number

    @staticmethod
    def stack(terms: list[CostTerms]) -> CostTerms:
        """Many as one, with a leading dimension."""
        fields = ("local_bytes", "chunks", "collectives", "messages", "plans", "copied_bytes")
        return CostTerms(
            np.stack([each.hops for each in terms]),
            **{name: np.array([getattr(each, name) for each in terms], dtype=np.float64) for name in fields},
        )


def cost_terms(algorithm: str, cell: AllToAllCell, chunks: int = 0, *, with_plan: bool = True) -> CostTerms:
    """The terms of `algorithm` in `cell`; they follow from its domains and dedup. chunks: 0 for the executor's CHUNKS;
    with_plan: with the all-to-alls of counts, as in forward, or by forward's plan, as in backward. Raises ValueError
    for an unknown algorithm."""
    return _UniformCell(cell, get_algorithm(algorithm), with_plan).terms(chunks or CHUNKS)


class _UniformCell:
    """The arithmetic of one algorithm in a cell whose domains are all of one size. Bytes are those of one rank."""

    def __init__(self, cell: AllToAllCell, algorithm: Algorithm, with_plan: bool = True) -> None:
        self.cell, self.algorithm, self.dedup, self.with_plan = cell, algorithm, algorithm.dedup, with_plan
        self.ranks = cell.ranks
        self.per_node = cell.ranks / cell.nodes
        self.per_rack = cell.ranks / cell.racks
        self.rows = cell.logical_bytes / cell.row_bytes
        hot = min(max(cell.imbalance, 1.0), cell.ranks) / cell.ranks
        self._hot, self._other = hot, (1 - hot) / max(cell.ranks - 1, 1)

    def popularity(self, size: float, *, hot: bool) -> float:
        """Share of all choices that a domain of `size` ranks gets, with the hot rank in it or without."""
        return (self._hot if hot else self._other) + (size - 1) * self._other

    def bytes_to(self, size: float, *, hot: bool = True, dedup: bool | None = None) -> float:
        """Bytes that one rank sends to a domain of `size` ranks; with dedup tokens once, and the metadata of each
        choice. dedup: as the algorithm where not given."""
        cell, popularity = self.cell, self.popularity(size, hot=hot)
        if not (self.dedup if dedup is None else dedup):
            return self.rows * popularity * cell.row_bytes
        reached = float(reach_probability(popularity * cell.experts, cell.experts, cell.top_k))
        tokens = self.rows / cell.top_k
        return tokens * reached * cell.row_bytes + self.rows * popularity * METADATA_BYTES

    def bytes_into(self, domain: float, unit: float) -> float:
        """Bytes from outside into the hot domain of `domain` ranks, per rank of it, where a row enters each `unit` of
        ranks in it once."""
        units = max(1.0, domain / unit)
        sent = self.bytes_to(unit) + (units - 1) * self.bytes_to(unit, hot=False)
        return (self.ranks - domain) * sent / domain

    @property
    def local_bytes(self) -> float:
        """Bytes that a rank sends to the other ranks of its node: every choice is a row."""
        size = self.per_node
        return self.bytes_to(size, dedup=False) * (size - 1) / size

    @property
    def forwarded_bytes(self) -> float:
        """Bytes that a rank received from other nodes and sends on to other ranks of its node."""
        size = self.per_node
        arrived = (self.ranks - size) * self.bytes_to(size, dedup=False) / size
        return arrived * (size - 1) / size

    def mean_bytes_beyond(self, size: float) -> float:
        """Bytes that the mean rank sends to other domains of `size` ranks."""
        domains = self.ranks / size
        balanced = _UniformCell(replace(self.cell, imbalance=1.0), self.algorithm)
        return (domains - 1) * balanced.bytes_to(size)

    def terms(self, chunks: int) -> CostTerms:
        ranks, node, rack = self.ranks, self.per_node, self.per_rack
        nodes, racks = self.cell.nodes, self.cell.racks
        sent = self.cell.logical_bytes
        hops: list[tuple[float, float, float]]
        if self.algorithm.levels == 1:
            unit = 1.0
            near = (node - 1) / node * (self.bytes_to(unit) + (node - 1) * self.bytes_to(unit, hot=False))
            hops = [(near, self.bytes_into(node, unit), self.bytes_into(rack, unit))]
            if not self.dedup or ranks == 1:
                return self._of_hops(hops, 0.0, [(ranks, 0)], chunks=1, copied=sent)
            copied = self.mean_bytes_beyond(1.0) + sent
            return self._of_hops(hops, 0.0, [(ranks, chunks), (1, chunks)], chunks=1, copied=copied)
        if nodes == 1:
            return self._of_hops([(self.local_bytes, 0.0, 0.0)], 0.0, [(ranks, 0)], chunks=1, copied=sent)
        last = (self.forwarded_bytes, 0.0, 0.0)
        if "rack" in self.algorithm.domains and 1 < racks < nodes:
            into_rack = self.bytes_into(rack, rack)
            # Each rank of a rack holds as much of what came from outside as of its own; a node's share of it stays.
            within = ranks / node * self.bytes_to(node) * (1 - node / rack)
            hops = [(0.0, into_rack, into_rack), (0.0, within, 0.0), last]
            groups = [(racks, chunks), (rack / node, chunks), (node, chunks)]
            away = self.mean_bytes_beyond(rack)
            away += self.mean_bytes_beyond(node) * (1 - node / rack) * nodes / (nodes - 1)
        else:
            hops = [(0.0, self.bytes_into(node, node), self.bytes_into(rack, node)), last]
            groups = [(nodes, chunks), (node, chunks)]
            away = self.mean_bytes_beyond(node)
        copied = sent / nodes + away + sent * (1 - 1 / nodes)
        return self._of_hops(hops, self.local_bytes, groups, chunks=chunks, copied=copied)

    def _of_hops(
        self,
        hops: list[tuple[float, float, float]],
        local_bytes: float,
        groups: list[tuple[float, int]],
        *,
        chunks: int,
        copied: float,
    ) -> CostTerms:
        """groups: (ranks, chunks that the executor sends) by level, chunks 0 where all rows are local."""
        levels = len(groups)
        collectives = messages = 0.0
        for level, (members, parts) in enumerate(groups):
            # Every chunk in dispatch and in combine, and at the last level the local rows; with dedup the weight of
            # each choice. A plan posts its counts, and with dedup the row index of each choice and the numbers of rows
            # at a middle level.
            last, dedup = level == levels - 1, self.dedup and levels > 1
            posted = 2 * parts + 2 * last + (dedup and not last)
            if self.with_plan:
                posted += 1 + (dedup and not last) + (dedup and 0 < level < levels - 1)
            if members > 1:
                collectives += posted
                messages += posted * (members - 1)
        padded = np.zeros((HOPS, len(LINKS)))
        padded[: len(hops)] = hops
        return CostTerms(
            padded,
            local_bytes,
            float(chunks),
            collectives,
            messages,
            plans=float(self.dedup * self.with_plan * (levels - 1)),
            copied_bytes=copied,
        )
