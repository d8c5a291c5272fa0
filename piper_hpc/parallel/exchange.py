"""The dispatcher of one rank: the algorithm that the layout names, over groups made of its expert group's nodes; and
what its plans send."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.family import Family
from piper_hpc.comm.levels import Places
from piper_hpc.parallel.groups import Groups
from piper_hpc.parallel.meter import Meter
from piper_hpc.spec.exchange import AUTO, CHUNKS
from piper_hpc.spec.layout import RankMap


@dataclass(frozen=True)
class Way:
    """How one expert group exchanges. chunks: parts in which rows between nodes travel, 0 for the usual number."""

    algorithm: str
    chunks: int = 0


Ways = Mapping[tuple[int, ...], Way]
"""What `auto` has chosen, by the ranks of each expert group; every rank has the same."""


def make_dispatcher(rank_map: RankMap, groups: Groups, timeout: timedelta, ways: Ways | None = None) -> Meter:
    """The dispatcher that `layout.all_to_all` names, or `ways` where that is auto, with what counts its bytes.

    Collective over the default group, as groups are made. Raises ValueError for an algorithm that is not of the family,
    and for auto without a choice for every group.
    """
    mine = groups.place.rank
    own = tuple(rank_map.expert_group(mine))
    dispatcher: FlatDispatcher | HaloDispatcher = FlatDispatcher(groups.expert)
    # Every rank makes the groups of every expert group, in one order.
    for ranks in expert_groups(rank_map):
        way = _way(rank_map.layout.all_to_all, ranks, ways)
        if way.algorithm == "flat" or len(ranks) == 1:
            continue
        family = Family(Places.of(rank_map, ranks), ranks, timeout)
        if mine in ranks:
            dispatcher = family.dispatcher(way.algorithm, chunks=way.chunks or CHUNKS)
        else:
            family.join(way.algorithm)
    return Meter(dispatcher, Places.of(rank_map, own), own.index(mine))


def expert_groups(rank_map: RankMap) -> list[tuple[int, ...]]:
    """The ranks of every expert group, in one order for all ranks."""
    return sorted({tuple(rank_map.expert_group(rank)) for rank in range(rank_map.layout.ranks)})


def _way(algorithm: str, ranks: tuple[int, ...], ways: Ways | None) -> Way:
    if algorithm != AUTO or len(ranks) == 1:
        return Way(algorithm)
    if ways is None or ranks not in ways:
        raise ValueError(
            f"all_to_all=auto: nothing was chosen for the ranks {', '.join(map(str, ranks))}; name an algorithm, for "
            "example all_to_all=flat"
        )
    return ways[ranks]
