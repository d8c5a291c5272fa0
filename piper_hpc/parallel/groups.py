"""The process groups of a layout: expert, replica, stage and pipeline group of this rank, from the rank map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from piper_hpc.runtime.group import lower_gloo_receiver_priority
from piper_hpc.spec.layout import RankMap, RankPlace


@dataclass(frozen=True)
class Groups:
    """The groups of this rank; None stands for a group of one, in which nothing needs to be sent.

    expert: ranks that share one copy of a stage's experts; replica: ranks with the same experts; stage: all ranks of
    the stage; pipeline: the ranks that pass activations to one another; world: all.
    """

    place: RankPlace
    expert: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None
    stage: dist.ProcessGroup | None
    pipeline: dist.ProcessGroup | None
    world: dist.ProcessGroup | None

    def close(self) -> None:
        """Destroy the groups that `make_groups` made; nothing may be under way in them, and nothing uses them after."""
        made = {
            id(group): group for group in (self.expert, self.replica, self.stage, self.pipeline) if group is not None
        }
        for group in made.values():
            if group is not self.world:
                dist.destroy_process_group(group)


def make_groups(rank_map: RankMap, timeout: timedelta) -> Groups:
    """Create every group of the layout; collective over the default group, which must be as large as the layout.

    Groups of the same ranks share one communicator. Raises ValueError where the default group has another size.
    """
    layout = rank_map.layout
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size != layout.ranks:
        raise ValueError(f"the layout {layout.name()} needs {layout.ranks} ranks, the job has {world_size}")
    rank = dist.get_rank() if dist.is_initialized() else 0
    made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def mine(members: Callable[[int], list[int]]) -> dist.ProcessGroup | None:
        for ranks in sorted({tuple(members(other)) for other in range(layout.ranks)}):
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks), timeout=timeout)
        return made.get(tuple(members(rank)))

    groups = Groups(
        place=rank_map.places[rank],
        expert=mine(rank_map.expert_group),
        replica=mine(rank_map.replica_group),
        stage=mine(rank_map.stage_group),
        pipeline=mine(rank_map.pipeline_group),
        world=dist.group.WORLD if layout.ranks > 1 else None,
    )
    lower_gloo_receiver_priority()
    return groups
