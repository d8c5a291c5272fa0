"""Which links the communicating groups of a layout cross, when ranks fill the nodes in order."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model.topology import Group, axis_groups, partner_tier
from piper_hpc.spec import TIERS, ClusterSpec, Layout, Tier
from piper_hpc.spec.schedules import holders

__all__ = ["TIERS", "Group", "LayoutGroups", "StageGroups", "layout_groups"]

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class StageGroups:
    """The groups of one pipeline rank: its expert shards, the replicas of an expert, and all its ranks."""

    experts: Group
    replicas: Group
    stage: Group


@dataclass(frozen=True)
class LayoutGroups:
    """All groups of a layout: by pipeline rank, and the whole job. boundaries: the tier of messages between the global
    stages s and s + 1, None where one rank holds both."""

    stages: tuple[StageGroups, ...]
    boundaries: tuple[str | None, ...]
    world: Group


def _farthest(nodes: Ids, racks: Ids) -> Group:
    """Peers by tier of the member with the farthest peers, over all groups; nodes and racks are [groups, members].

    Ranks are placed in blocks, so the nodes that hold the fewest members of a group are those of its ends.
    """
    views = []
    for end in (slice(0, 1), slice(-1, None)):
        same_node = (nodes == nodes[:, end]).sum(axis=1) - 1
        same_rack = (racks == racks[:, end]).sum(axis=1) - 1 - same_node
        beyond = nodes.shape[1] - 1 - same_node - same_rack
        views.append(np.stack([beyond, same_rack, same_node], axis=1))
    beyond, same_rack, same_node = max(map(tuple, np.concatenate(views).tolist()))
    return Group((0, same_node, 0, same_rack, beyond))


def layout_groups(layout: Layout, cluster: ClusterSpec) -> LayoutGroups:
    """The groups of `layout` on `cluster`, with ranks in `RankMap.block` order: shards, then replicas, then stages.

    By arithmetic where the cluster has a topology, else by enumerating the ranks over its nodes and racks.
    """
    partners = [tuple(sorted(pair)) for pair in pairwise(holders(layout.schedule, layout.pp, layout.vpp))]
    if cluster.topology is not None:
        axes, stage_ranks = axis_groups(layout, cluster.topology), layout.ranks // layout.pp
        return LayoutGroups(
            stages=(StageGroups(axes.expert_block, axes.replicas, axes.stage),) * layout.pp,
            boundaries=tuple(
                None if low == high else TIERS[partner_tier(cluster.topology, stage_ranks, low, high)]
                for low, high in partners
            ),
            world=axes.world,
        )
    nodes: Ids = np.arange(layout.ranks) // cluster.ranks_per_node
    racks: Ids = np.asarray(cluster.rack_of_node, dtype=np.int64)[nodes]
    shape = (layout.pp, layout.dp, layout.ep * layout.etp)
    node_of, rack_of = nodes.reshape(shape), racks.reshape(shape)
    stages = tuple(
        StageGroups(
            experts=_farthest(node, rack),
            replicas=_farthest(node.T, rack.T),
            stage=_farthest(node.reshape(1, -1), rack.reshape(1, -1)),
        )
        for node, rack in zip(node_of, rack_of, strict=True)
    )
    boundaries = tuple(
        None if low == high else _boundary(node_of[[low, high]].reshape(2, -1), rack_of[[low, high]].reshape(2, -1))
        for low, high in partners
    )
    return LayoutGroups(stages, boundaries, _farthest(nodes.reshape(1, -1), racks.reshape(1, -1)))


def _boundary(nodes: Ids, racks: Ids) -> str:
    """The widest link between the partners of two neighbouring stages; nodes and racks are [2, partners]."""
    if (racks[0] != racks[1]).any():
        return Tier.SYSTEM.value
    return Tier.RACK.value if (nodes[0] != nodes[1]).any() else Tier.NODE.value
