"""The groups that a layout's ranks form, and the links under them at the rate that collectives reach."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from piper_hpc.resource_model.numbers import Number
from piper_hpc.resource_model.topology import (
    AxisGroups,
    Group,
    Links,
    axis_groups,
    boundary_tier,
    tier_links,
    topology_of,
)
from piper_hpc.spec import ClusterSpec, Degrees, Link


@dataclass(frozen=True)
class Network:
    """The groups of a layout and the links under them."""

    groups: AxisGroups
    links: Links
    boundary_tier: Number

    def send_s(self, tier: Number, sent_bytes: Number) -> Number:
        """Seconds of one message, latency + bytes / rate (alpha-beta); tier: a tier's number or an array of them."""
        tiers = np.asarray(tier, dtype=np.int64)
        return self.links.latency_s[tiers] + sent_bytes * self.links.s_per_byte[tiers]


def network_of(cluster: ClusterSpec, layout: Degrees) -> Network:
    """The groups of `layout` on `cluster` and the links under them, at the rate that collectives reach."""
    accelerator = cluster.accelerator
    links = {
        tier: Link(link.latency_s, link.bytes_per_s * (accelerator.efficiency.link_share(tier) if accelerator else 1.0))
        for tier, link in cluster.links.items()
    }
    topology = topology_of(cluster)
    stage_ranks = layout.ep * layout.etp * layout.dp
    boundaries = [boundary_tier(topology, stage_ranks, stage) for stage in range(layout.pp - 1)]
    return Network(
        axis_groups(layout, topology),
        tier_links(links, name=cluster.name, tiers=topology.tiers),
        reduce(np.maximum, boundaries, 0),
    )


def widest_tier(group: Group) -> Number:
    """Number of the widest tier on which a group has peers."""
    return sum((group.within(tier) < group.size) * 1 for tier in range(len(group.peers) - 1))
