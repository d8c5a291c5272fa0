"""The dispatchers of one rank, by algorithm, over process groups that algorithms with the same hops share."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from piper_hpc.comm.channel import Channel, GroupChannel, Local
from piper_hpc.comm.flat import FlatDispatcher
from piper_hpc.comm.halo import HaloDispatcher
from piper_hpc.comm.levels import Chains, Places
from piper_hpc.runtime.group import let_senders_go_first
from piper_hpc.spec.exchange import CHUNKS, OVERLAP, Overlap


class Family:
    """What makes dispatchers for one expert group: `ranks` of the default group, which stand at `places`.

    Groups of processes are made by all ranks of the default group: where one rank calls `dispatcher`, all others of
    this group do, and those outside call `join`, all in one order.
    """

    def __init__(self, places: Places, ranks: Sequence[int], timeout: timedelta) -> None:
        self.places, self.ranks, self._timeout = places, tuple(ranks), timeout
        self._channels: dict[tuple[str, tuple[int, ...]], GroupChannel] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def dispatcher(
        self, algorithm: str, *, chunks: int = CHUNKS, overlap: Overlap = OVERLAP
    ) -> FlatDispatcher | HaloDispatcher:
        """The dispatcher of this rank, which is one of the group; flat has neither chunks nor overlap. Raises
        ValueError for an unknown algorithm."""
        chains, channels = self.join(algorithm)
        if algorithm == "flat":
            return FlatDispatcher.over(channels[0], len(self.ranks))
        place = self.ranks.index(dist.get_rank())
        dedup = algorithm.endswith("_dedup")
        return HaloDispatcher(chains, place, channels, dedup=dedup, chunks=chunks, overlap=overlap)

    def join(self, algorithm: str) -> tuple[Chains, list[Channel]]:
        """Make the groups of processes that `algorithm` needs, which is all that ranks outside of this group do; and
        the channels of this rank, by level. Raises ValueError for an unknown algorithm."""
        chains = Chains(algorithm, self.places)
        return chains, [self._channel(chains, level) for level in range(chains.depth)]

    def close(self) -> None:
        """End the groups; nothing may be under way in them, and no dispatcher is used after."""
        for group in self._groups.values():
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._channels.clear()

    def _channel(self, chains: Chains, level: int) -> Channel:
        own: Channel = Local()
        for members in chains.groups(level):
            group = tuple(self.ranks[member] for member in members)
            if len(group) == 1:
                continue
            if group not in self._groups:
                made: dist.ProcessGroup = dist.new_group(list(group), timeout=self._timeout)
                self._groups[group] = made
                let_senders_go_first()
            if dist.get_rank() in group:
                key = (chains.phase(level), group)
                if key not in self._channels:
                    self._channels[key] = GroupChannel(self._groups[group], chains.phase(level))
                own = self._channels[key]
        return own
