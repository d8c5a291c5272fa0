"""Bytes and seconds of what ranks send (Eq 6): all-to-all, stage-to-stage messages, gradient reduction, and waiting."""

from __future__ import annotations

import math

from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.groups import TIERS, Group
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.extrapolation import growth, nodes_beyond, tier_beyond
from piper_hpc.spec import IDLE, ModelSpec

EXTRAPOLATION = "extrapolation"
"""Beside the names of curves in a Cost: all that is used beyond the measured is wrong in the same direction."""


def all_to_all_bytes(tokens: int, model: ModelSpec, bytes_per_value: int) -> int:
    """The whole send buffer of one rank in one dispatch: tokens k d values; (EP-1)/EP of it leaves the rank."""
    return tokens * model.top_k * model.hidden * bytes_per_value


def p2p(curves: Curves, tier: str, message_bytes: float) -> Cost:
    """Seconds of one message of `message_bytes` over a link of `tier`, one way."""
    chosen = _nearest_tier(curves, "p2p", tier)
    if chosen is None:
        raise ResourceModelError(
            f"cluster '{curves.cluster.name}': its calibration ({curves.calibration.source}) has no p2p/{tier} curve "
            "and nothing near it, so messages between ranks cannot be timed. Measure the links with "
            f"`python -m piper_hpc.launch task=microbench cluster={curves.cluster.name}`"
        )
    return _beyond(curves.measured(f"p2p/{chosen}", message_bytes), tier_beyond(curves.cluster, tier))


def message(curves: Curves, tier: str, message_bytes: float, compute: Cost) -> Cost:
    """Seconds from when a stage has posted a message until its neighbour has it.

    The two ranks wait for each other as in any collective. `compute` is what the sender does before it waits too, and
    its threads that send get their turn.
    """
    pair = Group(tuple(int(each == tier) for each in TIERS))
    return p2p(curves, tier, message_bytes) + arrival_skew(curves, pair, compute)


def overhead(curves: Curves, tier: str, message_bytes: float) -> Cost:
    """Seconds of computing that one end of a message over a link of `tier` costs its rank: o of LogP (Culler et al.
    1993), as `piper_hpc.microbench.overhead` measures it. Where nothing did, messages are taken to cost none."""
    chosen = _nearest_tier(curves, "overhead", tier)
    if chosen is None:
        curves.note("overhead: not measured; messages between stages are taken to cost no compute")
        return Cost()
    return curves.measured(f"overhead/{chosen}", message_bytes)


def all_to_all(curves: Curves, group: Group, send_bytes: float) -> Cost:
    """Seconds of one all-to-all in `group`; `send_bytes` is the whole send buffer of one rank."""
    measured = _collective(curves, "all_to_all", group, send_bytes)
    if measured is not None:
        return measured
    curves.note(f"all_to_all/{group.tier}/{group.size}: not measured; one p2p message to every peer in turn stands in")
    pair_bytes = send_bytes / group.size
    return total(p2p(curves, tier, pair_bytes) * count for tier, count in zip(TIERS, group.peers, strict=True) if count)


def all_to_all_idle(curves: Curves, group: Group, send_bytes: float) -> float:
    """Seconds of one all-to-all in which this rank computes nothing; 0 where that was not measured."""
    measured = _collective(curves, f"{IDLE}all_to_all", group, send_bytes)
    return 0.0 if measured is None else measured.seconds


def all_reduce(curves: Curves, group: Group, buffer_bytes: float) -> Cost:
    """Seconds of one all-reduce of `buffer_bytes` in `group`."""
    measured = _collective(curves, "all_reduce", group, buffer_bytes)
    if measured is not None:
        return measured
    curves.note(f"all_reduce/{group.tier}/{group.size}: not measured; a ring of p2p messages stands in")
    return p2p(curves, group.tier, buffer_bytes / group.size) * (2 * (group.size - 1))


def all_gather(curves: Curves, group: Group, buffer_bytes: float) -> Cost:
    """Seconds until every rank of `group` has all `buffer_bytes`, of which each had an equal part."""
    measured = _collective(curves, "all_gather", group, buffer_bytes)
    if measured is not None:
        return measured
    curves.note(f"all_gather/{group.tier}/{group.size}: not measured; a ring of p2p messages stands in")
    return p2p(curves, group.tier, buffer_bytes / group.size) * (group.size - 1)


def arrival_skew(curves: Curves, group: Group, compute: Cost, under_way_s: float = 0.0) -> Cost:
    """Mean seconds that a rank waits for late ranks of `group` in a collective, after `compute` busy seconds.

    From the calibration's curves `skew/tier/size`, measured by `piper_hpc.microbench.arrival_skew`. Its half widths are
    the curve's own, and what those of `compute` change in it. Groups of another size or tier stand in unscaled; but on
    more nodes than were measured a larger group than any waits longer, as the latest of n ranks whose delays are normal
    is about sqrt(2 ln n) deviations behind the mean (extreme value theory). under_way_s: how much longer than in the
    smallest exchange, which skew is measured with, rows are on their way while a rank computes nothing: those of early
    ranks are, while a late one computes, so that what it adds is what of its lateness is longer. Ranks that share cores
    are charged nothing: one that waits lends its core to those it waits for.
    """
    if group.size == 1 or compute.seconds <= 0:
        return Cost()
    if curves.cluster.devices_share_cores:
        curves.note("skew: not charged, ranks share cores: a rank that waits lends its core to those it waits for")
        return Cost()
    chosen = _nearest_group(curves, "skew", group)
    if chosen is None:
        curves.note("skew: not measured; ranks are taken to arrive at every exchange together")
        return Cost()
    largest = max(size for tier in TIERS for size in curves.sizes(f"skew/{tier}/"))
    beyond = _size_beyond(curves, group, largest)
    scale = math.sqrt(math.log(group.size) / math.log(largest)) if beyond > 1 else 1.0
    if not chosen.endswith(f"/{group.size}"):
        scaled = f", times {scale:.3g}" if beyond > 1 else ""
        curves.note(f"skew/{group.tier}/{group.size}: not measured; {chosen} stands in{scaled}")
    waited = curves.measured(chosen, compute.seconds)
    later = {
        name: curves.measured(chosen, compute.seconds + width).seconds - waited.seconds
        for name, width in compute.half_widths.items()
    }
    late = _beyond((waited + Cost(0.0, later)) * scale, beyond)
    return late * max(0.0, 1 - under_way_s / late.seconds) if late.seconds > 0 else late


def _nearest_group(curves: Curves, operator: str, group: Group) -> str | None:
    """The curve of this group, else of its size on another tier (wider ones first), else of the nearest size."""
    place = TIERS.index(group.tier)
    found = [
        (size, tier)
        for tier in (*TIERS[place:], *reversed(TIERS[:place]))
        for size in curves.sizes(f"{operator}/{tier}/")
    ]
    if not found:
        return None
    nearest = _nearest_size([size for size, _ in found], group)
    return next(f"{operator}/{tier}/{size}" for size, tier in found if size == nearest)


def _nearest_size(sizes: list[int], group: Group) -> int:
    return min(sizes, key=lambda n: (abs(math.log(n / group.size)), n))


def _collective(curves: Curves, operator: str, group: Group, buffer_bytes: float) -> Cost | None:
    """Seconds from the curve of this group, or of the group of nearest size on the same tier; None without one.

    Another size n' is scaled at equal bytes per pair: (n-1)/(n'-1) times as many messages of B/n bytes, as in a
    pairwise exchange or a ring.
    """
    if group.size == 1 or buffer_bytes <= 0:
        return Cost()
    prefix = f"{operator}/{group.tier}/"
    sizes = curves.sizes(prefix)
    if not sizes:
        return None
    size = _nearest_size(sizes, group)
    beyond = max(_size_beyond(curves, group, max(sizes)), tier_beyond(curves.cluster, group.tier))
    if size == group.size:
        return _beyond(curves.measured(f"{prefix}{size}", buffer_bytes), beyond)
    curves.note(f"{prefix}{group.size}: not measured; {prefix}{size} stands in, scaled at equal bytes per pair")
    scaled = curves.measured(f"{prefix}{size}", buffer_bytes * size / group.size) * ((group.size - 1) / (size - 1))
    return _beyond(scaled, beyond)


def _size_beyond(curves: Curves, group: Group, largest: int) -> float:
    """Ranks of a group over those of the largest measured one, at least 1. On no more nodes than were measured it is 1
    whatever the size: predictions there do not depend on whether others can be made."""
    return max(1.0, group.size / largest) if nodes_beyond(curves.cluster) > 1 else 1.0


def _beyond(cost: Cost, beyond: float) -> Cost:
    """`cost` with the half width that it has so far beyond the measured, see extrapolation.growth."""
    return cost if beyond <= 1 else cost + Cost(0.0, {EXTRAPOLATION: cost.seconds * (growth(beyond) - 1)})


def _nearest_tier(curves: Curves, operator: str, tier: str) -> str | None:
    """`tier` if it was measured, else the next wider one, else the next narrower; None if none was."""
    place = TIERS.index(tier)
    for candidate in (*TIERS[place:], *reversed(TIERS[:place])):
        if f"{operator}/{candidate}" in curves:
            if candidate != tier:
                curves.note(f"{operator}/{tier}: not measured; {operator}/{candidate} stands in")
            return candidate
    return None
