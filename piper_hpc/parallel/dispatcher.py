"""Build the token dispatcher of one rank: the all-to-all algorithm of the layout over the rank's expert group."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.factory import DispatcherFactory, GroupDispatcher
from piper_hpc.comm.hierarchy import Places
from piper_hpc.parallel.groups import Groups
from piper_hpc.parallel.meter import ByteCountingDispatcher
from piper_hpc.spec.all_to_all import AUTO, CHUNKS, FLAT, AllToAllConfig
from piper_hpc.spec.layout import RankMap

AllToAllConfigs = Mapping[tuple[int, ...], AllToAllConfig]
"""Ranks of an expert group -> the algorithm that all_to_all=auto selected for it; equal on every rank."""


def make_dispatcher(
    rank_map: RankMap, groups: Groups, timeout: timedelta, configs: AllToAllConfigs | None = None
) -> ByteCountingDispatcher:
    """The dispatcher that `layout.all_to_all` names, or `configs` where that is auto, with what counts its bytes.

    Collective over the default group, as groups are made. Raises ValueError for an algorithm that is not in
    spec.ALGORITHMS, and for auto without a config for every group.
    """
    mine = groups.place.rank
    own = tuple(rank_map.expert_group(mine))
    dispatcher: GroupDispatcher = FlatDispatcher(groups.expert)
    factories = []
    # Every rank makes the groups of every expert group, in one order.
    for ranks in expert_groups(rank_map):
        config = _config(rank_map.layout.all_to_all, ranks, configs)
        if config.algorithm == FLAT.name or len(ranks) == 1:
            continue
        factory = DispatcherFactory(Places.of(rank_map, ranks), ranks, timeout)
        factories.append(factory)
        if mine in ranks:
            dispatcher = factory.dispatcher(config.algorithm, chunks=config.chunks or CHUNKS, overlap=config.overlap)
        else:
            factory.join(config.algorithm)
    return ByteCountingDispatcher(dispatcher, Places.of(rank_map, own), own.index(mine), factories)


def expert_groups(rank_map: RankMap) -> list[tuple[int, ...]]:
    """The ranks of every expert group, in one order for all ranks."""
    return sorted({tuple(rank_map.expert_group(rank)) for rank in range(rank_map.layout.ranks)})


def _config(algorithm: str, ranks: tuple[int, ...], configs: AllToAllConfigs | None) -> AllToAllConfig:
    if algorithm != AUTO or len(ranks) == 1:
        return AllToAllConfig(algorithm)
    if configs is None or ranks not in configs:
        raise ValueError(
            f"all_to_all=auto: nothing was chosen for the ranks {', '.join(map(str, ranks))}; name an algorithm, for "
            "example all_to_all=flat"
        )
    return configs[ranks]
