"""Groups of ranks of a layout, and the tiers that they cross, by arithmetic on domain sizes: one layout or a grid.

Ranks stand in blocks: for what is not an expert tp is fastest, then cp, data parallel, pp; for experts etp, then ep,
replicas, pp. All degrees may be integers or integer arrays that broadcast against one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import TIERS, ClusterSpec, Degrees, Link, Tier, Topology

Number = Any
"""An int or float, or a NumPy array of them; formulas broadcast."""

NODE, SYSTEM = TIERS.index(Tier.NODE.value), TIERS.index(Tier.SYSTEM.value)


@dataclass(frozen=True)
class Group:
    """A communicating group, as its member with the farthest peers sees it: peers by link tier, near to far."""

    peers: tuple[Number, ...] = (0,) * len(TIERS)

    @cached_property
    def size(self) -> Number:
        """Members of the group."""
        return 1 + sum(self.peers)

    @cached_property
    def tier(self) -> str:
        """The widest link in the group; `node` for a group of one. For a single group, not for a grid."""
        return next((tier for tier, count in zip(TIERS[::-1], self.peers[::-1], strict=True) if count), Tier.NODE.value)

    def within(self, tier: int) -> Number:
        """Members, itself included, that are no farther than tier number `tier` (0 is pair, 4 is system)."""
        return 1 + sum(self.peers[: tier + 1])

    def times(self, other: Group) -> Group:
        """The group of every pairing of two axes of ranks, for example (tensor) x (data) parallel ranks."""
        counts = [self.within(tier) * other.within(tier) for tier in range(len(TIERS))]
        return Group(tuple(count - nearer for count, nearer in zip(counts, [1, *counts], strict=False)))


def group(topology: Topology, size: Number, stride: Number = 1) -> Group:
    """The group of `size` ranks, `stride` apart, whose groups tile the ranks in order.

    The members that one sees inside a domain of D ranks are at worst gcd(size * stride, D) // stride, between 1 and
    size. Where sizes, strides and domains are multiples of one another (powers of two, say), all members see the same
    and this is exact; elsewhere it is, domain by domain, the fewest that any member of any group sees, attained in a
    job that is long enough, though not by one member in all domains at once.
    """
    span = size * stride
    inside = [np.clip(np.gcd(span, domain) // stride, 1, size) for domain in topology.sizes]
    # A wider domain never holds fewer members; where domains and strides do not nest, gcd alone could say so.
    for wide in range(1, len(inside)):
        inside[wide] = np.maximum(inside[wide], inside[wide - 1])
    counts = [*inside, size + 0 * stride]
    return Group(tuple(_plain(count - nearer) for count, nearer in zip(counts, [1, *counts], strict=False)))


def boundary_tier(topology: Topology, stage_ranks: Number, stage: Number) -> Number:
    """Number of the widest tier between partners of pipeline ranks `stage` and `stage + 1` (0 is pair, 4 is system)."""
    return partner_tier(topology, stage_ranks, stage, stage + 1)


def partner_tier(topology: Topology, stage_ranks: Number, low: Number, high: Number) -> Number:
    """Number of the widest tier between partners of pipeline ranks `low` < `high`, each of `stage_ranks` ranks.

    Exact: rank r of the one sends to r + (high - low) stage_ranks, and a boundary of D-sized domains separates some
    such pair if and only if it lies between the first rank of the one and the last of the other.
    """
    first, last = low * stage_ranks, (high + 1) * stage_ranks - 1
    return _plain(sum((first // domain != last // domain) * 1 for domain in topology.sizes))


@dataclass(frozen=True)
class AxisGroups:
    """The groups of a layout, each as its worst member sees it; fields of the layout may be arrays.

    experts is the all-to-all group (ep, `etp` apart); expert_block all ranks that hold one copy of a stage's experts;
    replicas the ranks of equal experts; dense those of equal copies of all else (context and data parallel); stage all
    ranks of a stage.
    """

    tensor: Group
    context: Group
    dense: Group
    expert_tensor: Group
    experts: Group
    expert_block: Group
    replicas: Group
    stage: Group
    world: Group


def axis_groups(layout: Degrees, topology: Topology, *, host_ranks: int | None = None) -> AxisGroups:
    """The groups of `layout` in its placement: `linear`, `pack` or `strided`.

    linear: experts are adjacent ranks, replicas follow; pack: the same, on ranks that were sorted by domain. strided:
    the expert group takes one place of every node (rails: ep is `host_ranks` ranks apart, by default a scale-up
    domain), the places of a node are filled by etp and replicas; where a node is not filled so (dp * etp no multiple of
    the node), the group of such a layout is that of `linear`.
    Raises ResourceModelError for another placement.
    """
    shards = layout.ep * layout.etp
    stage_ranks = shards * layout.dp
    dense_dp = stage_ranks // (layout.tp * layout.cp)
    experts = group(topology, layout.ep, layout.etp)
    expert_block = group(topology, shards)
    replicas = group(topology, layout.dp, shards)
    if layout.placement == "strided":
        node = host_ranks or topology.node
        inner = np.maximum(node // layout.etp, 1)
        fits = (node % layout.etp == 0) & (layout.dp % inner == 0)
        rails = group(topology, layout.ep, node)
        experts = _where(fits, rails, experts)
        expert_block = _where(fits, rails.times(group(topology, layout.etp)), expert_block)
        outer = group(topology, np.where(fits, layout.dp // inner, 1), node * layout.ep)
        replicas = _where(fits, group(topology, inner, layout.etp).times(outer), replicas)
    elif layout.placement not in ("linear", "pack"):
        raise ResourceModelError(f"placement={layout.placement}: must be linear, pack or strided, for example linear")
    return AxisGroups(
        tensor=group(topology, layout.tp),
        context=group(topology, layout.cp, layout.tp),
        dense=group(topology, layout.cp * dense_dp, layout.tp),
        expert_tensor=group(topology, layout.etp),
        experts=experts,
        expert_block=expert_block,
        replicas=replicas,
        stage=group(topology, stage_ranks),
        world=group(topology, layout.pp * stage_ranks),
    )


def topology_of(cluster: ClusterSpec) -> Topology:
    """The cluster's topology, or the one that its nodes and racks make where all racks but the last are equal.

    Raises ResourceModelError for racks of unequal sizes: enumerate their ranks instead (groups.layout_groups).
    """
    if cluster.topology is not None:
        return cluster.topology
    racks = cluster.rack_of_node
    per_rack = racks.count(racks[0]) if racks else 1
    if tuple(racks) != tuple(racks[0] + node // per_rack for node in range(len(racks))):
        raise ResourceModelError(
            f"cluster '{cluster.name}': racks={list(racks)} are not blocks of equal size, so groups of ranks have no "
            f"closed form; give cluster.racks as blocks, for example {[node // per_rack for node in range(len(racks))]}"
        )
    return Topology(node=cluster.ranks_per_node, rack=per_rack * cluster.ranks_per_node)


@dataclass(frozen=True)
class Links:
    """The link of every tier, near to far, with what stood in for tiers of which nothing is known."""

    links: tuple[Link, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def latency_s(self) -> npt.NDArray[np.float64]:
        """Latency by tier, [5]: index it with a tier number, or an array of them."""
        return np.array([link.latency_s for link in self.links])

    @cached_property
    def s_per_byte(self) -> npt.NDArray[np.float64]:
        """Seconds per byte of one rank by tier, [5]."""
        return np.array([1 / link.bytes_per_s for link in self.links])


def tier_links(links: Mapping[str, Link], *, name: str = "given", tiers: Sequence[str] = TIERS) -> Links:
    """The link of every tier; one that is missing is the next wider known one, else the next nearer.

    tiers: those that the machine has, of which a stand-in is noted. Raises ResourceModelError where no tier is known.
    """
    if not links:
        raise ResourceModelError(
            f"cluster '{name}': no link is known, so messages between ranks cannot be timed. Measure them with "
            f"`python -m piper_hpc.launch task=microbench cluster={name}`, or give cluster.data_sheet.links"
        )
    unknown = sorted(set(links) - set(TIERS))
    if unknown:
        raise ResourceModelError(f"link '{unknown[0]}': must be one of {', '.join(TIERS)}, for example node")
    chosen = [_nearest(links, tier) for tier in range(len(TIERS))]
    notes = tuple(
        f"link {tier}: not known; {stand_in} stands in"
        for tier, stand_in in zip(TIERS, chosen, strict=True)
        if tier != stand_in and tier in tiers
    )
    return Links(tuple(links[tier] for tier in chosen), notes)


def _nearest(links: Mapping[str, Link], tier: int) -> str:
    return next(name for name in (*TIERS[tier:], *reversed(TIERS[:tier])) if name in links)


def _where(condition: Number, chosen: Group, other: Group) -> Group:
    return Group(tuple(_plain(np.where(condition, a, b)) for a, b in zip(chosen.peers, other.peers, strict=True)))


def _plain(value: Number) -> Number:
    """A Python int where NumPy made a single number of plain ones, so that scalars stay scalars."""
    return int(value) if np.ndim(value) == 0 else value
