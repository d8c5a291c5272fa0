"""The dispatcher of one rank: the algorithm that the layout names, over groups made of its expert group's nodes."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.channel import Channel, GroupChannel, Local
from piper_hpc.comm.levels import Chains, Places
from piper_hpc.model.dispatcher import Dispatcher
from piper_hpc.parallel.groups import Groups
from piper_hpc.spec.layout import RankMap


def make_dispatcher(rank_map: RankMap, groups: Groups, timeout: timedelta) -> Dispatcher:
    """The dispatcher that `layout.all_to_all` names; collective over the default group, as groups are made.

    Raises ValueError for an algorithm that is not of the family.
    """
    algorithm, mine = rank_map.layout.all_to_all, groups.place.rank
    if algorithm == "flat" or groups.expert is None:
        return FlatDispatcher(groups.expert)
    dispatcher: Dispatcher | None = None
    # Every rank makes the groups of every expert group, in one order.
    for ranks in sorted({tuple(rank_map.expert_group(rank)) for rank in range(rank_map.layout.ranks)}):
        chains = Chains(algorithm, places_of(rank_map, ranks))
        channels: list[Channel] = []
        for level in range(chains.depth):
            channel: Channel = Local()
            for members in chains.groups(level):
                group = [ranks[member] for member in members]
                made = dist.new_group(group, timeout=timeout) if len(group) > 1 else None
                if made is not None and mine in group:
                    channel = GroupChannel(made, chains.phase(level))
            channels.append(channel)
        if mine in ranks:
            dedup = algorithm.endswith("_dedup")
            dispatcher = HaloDispatcher(chains, ranks.index(mine), channels, dedup=dedup)
    assert dispatcher is not None
    return dispatcher


def places_of(rank_map: RankMap, ranks: tuple[int, ...]) -> Places:
    """Node and rack of each rank of an expert group."""
    places = [rank_map.places[rank] for rank in ranks]
    return Places(tuple(place.node for place in places), tuple(place.rack for place in places))
