"""What one dispatch and its combine ask of a machine: bytes through its links, exchanges and messages, bytes copied.

Every number is that of the rank, node or rack that has most to do, since all others wait for it. The group is uniform
(W ranks on N nodes in Q racks) and the routing is that of one hot rank, which gets `imbalance` times the mean while the
others share the rest equally. Formulas: arXiv 2605.05049 Algorithm 1 for the hops; the share left by deduplication as
in `resource_model.all_to_all.dedup_ratio`, here with the popularity of each domain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import CHUNKS, LEVELS, METADATA_BYTES, ExchangeCell

HOPS = 3
"""The most hops a row takes: between racks, between nodes, inside a node."""

LINKS = LEVELS
"""What fills up: the links inside a node (bytes that go to its other ranks), a node's way out (bytes that leave the
node, wherever they go) and a rack's (bytes that leave the rack)."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Demand:
    """hops [..., HOPS, LINKS]: bytes that one rank's share of a link carries in each hop, one way, those of `own` (the
    rows of the own node, which go beside) apart; both are moved twice, out and home. chunks: parts that follow one
    another through the hops; exchanges, messages: collectives posted, and parts of them sent to peers; plans: levels
    whose rows are shared, of which each is planned apart; copied_bytes: packed and put in order, both ways.
    """

    hops: Array
    own: Number
    chunks: Number
    exchanges: Number
    messages: Number
    plans: Number
    copied_bytes: Number

    @staticmethod
    def stack(demands: list[Demand]) -> Demand:
        """Many as one, with a leading dimension."""
        fields = ("own", "chunks", "exchanges", "messages", "plans", "copied_bytes")
        return Demand(
            np.stack([each.hops for each in demands]),
            **{name: np.array([getattr(each, name) for each in demands], dtype=np.float64) for name in fields},
        )


def demand(algorithm: str, cell: ExchangeCell, chunks: int = 0, *, planned: bool = True) -> Demand:
    """What `algorithm` asks for; chunks 0: the executor's own number; planned: with the counts, as in forward, or by
    the plan that forward made, as in backward. See `Demand`."""
    return _Uniform(cell, algorithm, planned).demand(chunks or CHUNKS)


class _Uniform:
    """A cell with the arithmetic of its domains."""

    def __init__(self, cell: ExchangeCell, algorithm: str, planned: bool = True) -> None:
        self.cell, self.dedup, self.planned = cell, algorithm.endswith("_dedup"), planned
        self.algorithm = algorithm.removesuffix("_dedup")
        self.ranks = cell.ranks
        self.per_node = cell.ranks / cell.nodes
        self.per_rack = cell.ranks / cell.racks
        self.rows = cell.logical_bytes / cell.row_bytes
        hot = min(max(cell.imbalance, 1.0), cell.ranks) / cell.ranks
        self._hot, self._other = hot, (1 - hot) / max(cell.ranks - 1, 1)

    def popular(self, size: float, *, hot: bool) -> float:
        """Share of all choices that a domain of `size` ranks gets, with the hot rank in it or without."""
        return (self._hot if hot else self._other) + (size - 1) * self._other

    def needed(self, size: float, *, hot: bool = True, shared: bool | None = None) -> float:
        """Bytes that one rank has for a domain of `size` ranks; a choice that shares a row sends its index instead."""
        cell, popular = self.cell, self.popular(size, hot=hot)
        if not (self.dedup if shared is None else shared):
            return self.rows * popular * cell.row_bytes
        missed = 1.0
        for drawn in range(cell.top_k):
            missed *= max(0.0, 1 - popular * cell.experts / (cell.experts - drawn))
        tokens = self.rows / cell.top_k
        return tokens * (1 - missed) * cell.row_bytes + self.rows * popular * METADATA_BYTES

    def into(self, domain: float, unit: float) -> float:
        """Bytes into the hot domain of `domain` ranks, per rank of it, in rows that go once to each `unit` of ranks."""
        units = max(1.0, domain / unit)
        needed = self.needed(unit) + (units - 1) * self.needed(unit, hot=False)
        return (self.ranks - domain) * needed / domain

    @property
    def inside(self) -> float:
        """Bytes of one rank's own node that go to its other ranks: every choice is a row."""
        size = self.per_node
        return self.needed(size, shared=False) * (size - 1) / size

    @property
    def onward(self) -> float:
        """Bytes that came from other nodes and go to other ranks of this one, per rank."""
        size = self.per_node
        arrived = (self.ranks - size) * self.needed(size, shared=False) / size
        return arrived * (size - 1) / size

    def mean_rows(self, size: float) -> float:
        """Bytes that one rank sends beyond its own domain of `size` ranks, taken over all ranks."""
        domains = self.ranks / size
        balanced = _Uniform(replace(self.cell, imbalance=1.0), f"{self.algorithm}{'_dedup' * self.dedup}")
        return (domains - 1) * balanced.needed(size)

    def demand(self, chunks: int) -> Demand:
        ranks, node, rack = self.ranks, self.per_node, self.per_rack
        nodes, racks = self.cell.nodes, self.cell.racks
        sent = self.cell.logical_bytes
        hops: list[tuple[float, float, float]]
        if self.algorithm == "flat":
            unit = 1.0
            near = (node - 1) / node * (self.needed(unit) + (node - 1) * self.needed(unit, hot=False))
            hops = [(near, self.into(node, unit), self.into(rack, unit))]
            if not self.dedup or ranks == 1:
                return self._made(hops, 0.0, [(ranks, 0)], chunks=1, copied=sent)
            return self._made(hops, 0.0, [(ranks, chunks), (1, chunks)], chunks=1, copied=self.mean_rows(1.0) + sent)
        if nodes == 1:
            return self._made([(self.inside, 0.0, 0.0)], 0.0, [(ranks, 0)], chunks=1, copied=sent)
        last = (self.onward, 0.0, 0.0)
        if self.algorithm == "halo3" and 1 < racks < nodes:
            into_rack = self.into(rack, rack)
            # Each rank of a rack holds as much of what came from outside as of its own; a node's share of it stays.
            within = ranks / node * self.needed(node) * (1 - node / rack)
            hops = [(0.0, into_rack, into_rack), (0.0, within, 0.0), last]
            groups = [(racks, chunks), (rack / node, chunks), (node, chunks)]
            away = self.mean_rows(rack) + self.mean_rows(node) * (1 - node / rack) * nodes / (nodes - 1)
        else:
            hops = [(0.0, self.into(node, node), self.into(rack, node)), last]
            groups = [(nodes, chunks), (node, chunks)]
            away = self.mean_rows(node)
        copied = sent / nodes + away + sent * (1 - 1 / nodes)
        return self._made(hops, self.inside, groups, chunks=chunks, copied=copied)

    def _made(
        self,
        hops: list[tuple[float, float, float]],
        own: float,
        groups: list[tuple[float, int]],
        *,
        chunks: int,
        copied: float,
    ) -> Demand:
        """groups: (ranks, parts that the executor sends) by level, parts 0 where all rows are the own node's."""
        levels = len(groups)
        exchanges = messages = 0.0
        for level, (members, parts) in enumerate(groups):
            # Out and home every part, and on the last level the own node's rows; of shared rows the weight of each
            # choice. A plan exchanges counts, and of shared rows the index of each choice and the numbers of rows that
            # a middle level learns.
            last, shared = level == levels - 1, self.dedup and levels > 1
            posted = 2 * parts + 2 * last + (shared and not last)
            if self.planned:
                posted += 1 + (shared and not last) + (shared and 0 < level < levels - 1)
            if members > 1:
                exchanges += posted
                messages += posted * (members - 1)
        padded = np.zeros((HOPS, len(LINKS)))
        padded[: len(hops)] = hops
        return Demand(
            padded,
            own,
            float(chunks),
            exchanges,
            messages,
            plans=float(self.dedup * self.planned * (levels - 1)),
            copied_bytes=copied,
        )
