"""The hierarchy of an expert group: which ranks do an all-to-all at each level, and by which of them a row goes on.

Plain arithmetic on where ranks stand. An algorithm's nested domains (racks, nodes, ranks) split the group, widest
first. One hop a level: between the domains of the level, each rank sends to one rank of every other domain (its rail:
the one on the network card of equal number where there is one, else the one of equal place); the last hop is inside the
narrowest domain, straight to each rank. `flat` has that hop alone; `flat_dedup` takes every rank for a domain: a row
goes to it once, and the last hop, a group of one, copies it to the rank's experts.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from piper_hpc.spec.all_to_all import Domain, get_algorithm
from piper_hpc.spec.layout import RankMap


@dataclass(frozen=True)
class Places:
    """Where the ranks of one expert group stand, [ranks] in group order: the node and rack of each, as any labels, and
    the number on its node of the network card that it uses (without `nic_of_rank` all have the same)."""

    node_of_rank: tuple[int, ...]
    rack_of_rank: tuple[int, ...]
    nic_of_rank: tuple[int, ...] | None = None

    @staticmethod
    def of(rank_map: RankMap, ranks: Sequence[int]) -> Places:
        """The places of `ranks`, in this order."""
        places = [rank_map.places[rank] for rank in ranks]
        return Places(
            tuple(place.node for place in places),
            tuple(place.rack for place in places),
            tuple(place.nic for place in places),
        )

    @property
    def ranks(self) -> int:
        """Ranks in the group."""
        return len(self.node_of_rank)

    def tier(self, a: int, b: int) -> str:
        """The widest link between two ranks: self, node, rack (other node, same rack) or system."""
        if a == b:
            return "self"
        if self.rack_of_rank[a] != self.rack_of_rank[b]:
            return "system"
        return "node" if self.node_of_rank[a] == self.node_of_rank[b] else "rack"


@dataclass(frozen=True)
class Hop:
    """One rank's all-to-all of one level. phase: its name in errors; group: the ranks that take part, in the order of
    their messages; peer_of_target: for each rank of the domain before the hop, the index into `group` of the rank that
    its rows are sent to."""

    phase: str
    group: tuple[int, ...]
    peer_of_target: tuple[int, ...]


@dataclass(frozen=True)
class HopChain:
    """The hops of one rank, in order.

    domains[i]: target ranks of the rows that this rank holds before hop i; sources[i]: their source ranks, in the
    order in which their rows are held; arriving[i][q]: how many of sources[i + 1] come from peer q of hop i, 0 where
    that peer relays rows for this rank's domain through another rank. Before the first hop a rank holds its own rows,
    for all targets; after the last, rows of all sources, for itself.
    """

    rank: int
    hops: tuple[Hop, ...]
    domains: tuple[tuple[int, ...], ...]
    sources: tuple[tuple[int, ...], ...]
    arriving: tuple[tuple[int, ...], ...]

    @property
    def local(self) -> tuple[int, ...]:
        """Ranks of this rank's narrowest domain (its node): rows among them take the last hop alone; all ranks where
        there is one hop."""
        return self.hops[-1].group


def levels_of(algorithm: str, places: Places) -> list[tuple[str, tuple[Hashable, ...]]]:
    """(phase, domain of each rank) of each level, widest domains first.

    A level of a single domain would join nothing and is left out, and so are racks of one node each. Nodes of one rank
    are kept: there a row that arrives once is copied to that rank's experts.
    Raises ValueError for an algorithm that is not in ALGORITHMS.
    """
    domains = get_algorithm(algorithm).domains
    ranks: tuple[Hashable, ...] = tuple(range(places.ranks))
    of_rank: dict[Domain, tuple[Hashable, ...]] = {
        "rank": ranks,
        "node": tuple(zip(places.rack_of_rank, places.node_of_rank, strict=True)),
        "rack": places.rack_of_rank,
    }
    kept = [(f"inside {domains[-1]}s" if domains else "flat", ranks)]
    for domain in reversed(domains):
        labels = of_rank[domain]
        if len(set(labels)) > 1 and (len(kept) == 1 or len(set(labels)) < len(set(kept[0][1]))):
            kept.insert(0, (f"between {domain}s", labels))
    return kept


class Hierarchy:
    """The levels of `algorithm` on a group, and the hops of each of its ranks, computed when asked for."""

    def __init__(self, algorithm: str, places: Places) -> None:
        self.places = places
        self._levels = levels_of(algorithm, places)
        self._nic = places.nic_of_rank or (0,) * places.ranks
        self._hop_of = lru_cache(maxsize=None)(self._make_hop)
        self._rails = lru_cache(maxsize=None)(self._make_rails)
        self._sources = lru_cache(maxsize=None)(self._make_sources)

    @property
    def depth(self) -> int:
        """Hops of a row, 1 to 3."""
        return len(self._levels)

    def chain(self, rank: int) -> HopChain:
        """The hops of one rank."""
        domains = tuple(self.domain(rank, level) for level in range(self.depth + 1))
        hops = tuple(self._hop_of(rank, level) for level in range(self.depth))
        return HopChain(
            rank=rank,
            hops=hops,
            domains=domains,
            sources=tuple(self._sources(rank, level) for level in range(self.depth + 1)),
            arriving=tuple(
                tuple(
                    len(self._sources(peer, level)) if self._relays(peer, level, rank) else 0
                    for peer in hops[level].group
                )
                for level in range(self.depth)
            ),
        )

    def domain(self, rank: int, level: int) -> tuple[int, ...]:
        """Ranks of the domain that hop `level` joins with others; level 0 is the whole group, `depth` the rank."""
        members = range(self.places.ranks)
        if level == 0:
            return tuple(members)
        labels = self._levels[level - 1][1]
        return tuple(other for other in members if labels[other] == labels[rank])

    def groups(self, level: int) -> list[tuple[int, ...]]:
        """All groups of a level, each once, in an order that every rank derives alike."""
        return sorted({self._hop_of(rank, level).group for rank in range(self.places.ranks)})

    def phase(self, level: int) -> str:
        """What the hop is called."""
        return self._levels[level][0]

    def _make_hop(self, rank: int, level: int) -> Hop:
        """Rank number `turn` of a rail sends to number `turn` of the same rail in every other domain, or to its first
        where that has fewer."""
        phase, labels = self._levels[level]
        scope = self.domain(rank, level)
        rails = self._rails(scope, level)
        own = rails[labels[rank]]
        rail = next(number for number, ranks in enumerate(own) if rank in ranks)
        turn = own[rail].index(rank)
        on_rail = {label: domain[rail] for label, domain in rails.items()}
        group = tuple(sorted(other for ranks in on_rail.values() for other in ranks))
        relay = {label: ranks[turn if turn < len(ranks) else 0] for label, ranks in on_rail.items()}
        return Hop(phase, group, tuple(group.index(relay[labels[target]]) for target in scope))

    def _make_rails(self, scope: tuple[int, ...], level: int) -> dict[Hashable, list[list[int]]]:
        """By domain of `scope`, its ranks on each rail. Domains may differ in size: the rails are as many as the
        smallest has ranks, each with the card of one of those."""
        domains: dict[Hashable, list[int]] = {}
        for rank in sorted(scope, key=lambda rank: (self._nic[rank], rank)):
            domains.setdefault(self._levels[level][1][rank], []).append(rank)
        cards = [self._nic[rank] for rank in min(domains.values(), key=len)]
        return {label: self._deal(ranks, cards) for label, ranks in domains.items()}

    def _deal(self, ranks: list[int], cards: list[int]) -> list[list[int]]:
        """`ranks`, at least as many as rails, in rounds of one a rail: first those of the rail's card, then the others
        to the rails that have none in this round."""
        rails: list[list[int]] = [[] for _ in cards]
        left = list(ranks)
        while left:
            without = []
            for rail, card in zip(rails, cards, strict=True):
                equal = next((rank for rank in left if self._nic[rank] == card), None)
                if equal is None:
                    without.append(rail)
                else:
                    rail.append(equal)
                    left.remove(equal)
            for rail in without[: len(left)]:
                rail.append(left.pop(0))
        return rails

    def _relays(self, sender: int, level: int, rank: int) -> bool:
        """Whether `sender` sends its rows for the domain of `rank` to `rank` itself, which relays them."""
        hop = self._hop_of(sender, level)
        return hop.group[hop.peer_of_target[self.domain(sender, level).index(rank)]] == rank

    def _make_sources(self, rank: int, level: int) -> tuple[int, ...]:
        if level == 0:
            return (rank,)
        senders = [peer for peer in self._hop_of(rank, level - 1).group if self._relays(peer, level - 1, rank)]
        return tuple(source for peer in senders for source in self._sources(peer, level - 1))
