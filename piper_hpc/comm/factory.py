"""Dispatchers of one rank, by algorithm, over process groups that algorithms with the same hops share."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from piper_hpc.comm.channel import Channel, GroupChannel, Local
from piper_hpc.comm.hierarchy import Hierarchy, Places
from piper_hpc.comm.volume import Sent
from piper_hpc.runtime.group import lower_gloo_receiver_priority
from piper_hpc.spec.all_to_all import CHUNKS, OVERLAP, Overlap, get_algorithm
from piper_hpc.spec.expert_placement import ExpertPlacement


class GroupDispatcher(Protocol):
    """A `piper_hpc.model.dispatcher.Dispatcher` over an expert group, which can also say what its plans send."""

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> tuple[torch.Tensor, Any]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`; the handle has its plan as `plan`."""

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""

    def sent(self, plan: Any) -> Sequence[Sent]:
        """Every message of rows and metadata that this rank sends in one dispatch of `plan`."""


class Build(Protocol):
    """What `Algorithm.dispatcher` names: a class or function that makes the dispatcher of one rank.

    hierarchy: the algorithm's levels on the group; rank: index into the group; channels: of this rank, one a level;
    dedup: of the algorithm; chunks, overlap: see `spec.CHUNKS` and `spec.Overlap`. Every rank of a group is built with
    the same algorithm, places, chunks and overlap.
    """

    def __call__(
        self,
        hierarchy: Hierarchy,
        rank: int,
        channels: Sequence[Channel],
        *,
        dedup: bool,
        chunks: int = ...,
        overlap: Overlap = ...,
    ) -> GroupDispatcher: ...


def builder(algorithm: str) -> Build:
    """What makes the dispatchers of an algorithm. Raises ValueError for a name that is not in ALGORITHMS."""
    build: Build = pkgutil.resolve_name(get_algorithm(algorithm).dispatcher)
    return build


class DispatcherFactory:
    """Makes the dispatchers of one expert group: `ranks` of the default group, which stand at `places`.

    Groups of processes are made by all ranks of the default group: where one rank calls `dispatcher`, all others of
    this expert group do, and those outside call `join`, all in one order.
    """

    def __init__(self, places: Places, ranks: Sequence[int], timeout: timedelta) -> None:
        self.places, self.ranks, self._timeout = places, tuple(ranks), timeout
        self._channels: dict[tuple[str, tuple[int, ...]], GroupChannel] = {}
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def dispatcher(self, algorithm: str, *, chunks: int = CHUNKS, overlap: Overlap = OVERLAP) -> GroupDispatcher:
        """The dispatcher of this rank, which is one of the group. Raises ValueError for an unknown algorithm."""
        hierarchy, channels = self.join(algorithm)
        rank, dedup = self.ranks.index(dist.get_rank()), get_algorithm(algorithm).dedup
        return builder(algorithm)(hierarchy, rank, channels, dedup=dedup, chunks=chunks, overlap=overlap)

    def join(self, algorithm: str) -> tuple[Hierarchy, list[Channel]]:
        """Make the groups of processes that `algorithm` needs, which is all that ranks outside of this expert group do;
        and the channels of this rank, by level. Raises ValueError for an unknown algorithm."""
        hierarchy = Hierarchy(algorithm, self.places)
        return hierarchy, [self._channel(hierarchy, level) for level in range(hierarchy.depth)]

    def close(self) -> None:
        """Destroy the groups; no all-to-all may be under way in them, and no dispatcher is used after."""
        for group in self._groups.values():
            if group != dist.GroupMember.NON_GROUP_MEMBER:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._channels.clear()

    def _channel(self, hierarchy: Hierarchy, level: int) -> Channel:
        own: Channel = Local()
        for members in hierarchy.groups(level):
            group = tuple(self.ranks[member] for member in members)
            if len(group) == 1:
                continue
            if group not in self._groups:
                made: dist.ProcessGroup = dist.new_group(list(group), timeout=self._timeout)
                self._groups[group] = made
                lower_gloo_receiver_priority()
            if dist.get_rank() in group:
                key = (hierarchy.phase(level), group)
                if key not in self._channels:
                    self._channels[key] = GroupChannel(self._groups[group], hierarchy.phase(level))
                own = self._channels[key]
        return own
