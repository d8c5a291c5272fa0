"""Seconds, bytes, rows and messages of one all-to-all by any algorithm: one to three levels, deduplicated or not.

One rank sends B bytes, B / W to each of the W ranks of its group. An algorithm of several levels sends the whole buffer
once a level, farthest first: between the domains of a level (each rank to the rank of equal place), then inside them.

    T = sum over levels [ sum over the n - 1 peers of the level (a + B/n b r s) ] + copies B g

n: domains that a level joins; a, b: latency and time per byte of the peer's tier (Link: all ranks of a node send);
r: share of rows left by deduplication; s: load of the hottest domain over the mean; g: time per byte of a local copy.
The levels follow from the algorithm's domains (spec.Algorithm). Flat is one level of n = W; `halo` has two, between
nodes and inside them, and is Algorithm 1 of arXiv 2605.05049; a `rack` domain adds a third between, of the switch or,
where the group has no switch to itself, the rack. Deduplication is per level, as in arXiv 2508.09591, except inside a
node, where every (token, expert) row is sent; `flat_dedup` sends a token once to each rank that has an expert of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.topology import NODE, SYSTEM, Group, Links, Number
from piper_hpc.spec import ALGORITHMS, METADATA_BYTES, TIERS, Algorithm, Tier, reach_probability

SWITCH, RACK = TIERS.index(Tier.SWITCH.value), TIERS.index(Tier.RACK.value)
NEAR, FAR = range(NODE + 1), range(NODE + 1, SYSTEM + 1)

Phases = Literal["overlapped", "sequential", "merged"]


@dataclass(frozen=True)
class AllToAllRouting:
    """How tokens choose experts, as far as an all-to-all depends on it.

    groups, groups_per_token: group-limited routing (0: a token may go anywhere); imbalance: load of the hottest rank
    over the mean, at least 1; shares: measured popularity of each expert, [experts], in the order of their ranks
    (empty: uniform).
    """

    experts: int
    top_k: int
    groups: int = 0
    groups_per_token: int = 0
    imbalance: Number = 1.0
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class AllToAllCost:
    """One all-to-all, of one layout or a grid of them. Bytes, rows and messages are what the mean rank sends, by tier
    from near to far.

    seconds: until the hottest rank has its rows; hidden_s: seconds that overlap with it (phase 1 of `halo`);
    payload_bytes: rows alone; metadata_bytes: of deduplicated rows; algorithm: its place in ALGORITHMS.
    """

    seconds: Number
    hidden_s: Number
    rows: tuple[Number, ...]
    payload_bytes: tuple[Number, ...]
    metadata_bytes: tuple[Number, ...]
    messages: tuple[Number, ...]
    algorithm: Number


def dedup_ratio(domains: Number, routing: AllToAllRouting) -> Number:
    """Share r of rows left when a token enters each of `domains` equal domains at most once.

    domains: one number or a grid of them; the result has its shape. Uniform routing: r(N) = N P(E / N) / k with P of
    `spec.reach_probability`: N (1 - C(E - E/N, k) / C(E, k)) / k, exact. Group-limited routing reaches at most
    groups_per_token max(1, N / groups) domains, so r <= that / k. Measured shares: the sum over the domains of P(p E),
    p the popularity of each, over k; equal shares give the uniform formula, else it is an approximation. Per level:
    arXiv 2508.09591.
    """
    experts, top_k = routing.experts, routing.top_k
    domains = np.minimum(np.maximum(domains, 1), experts)
    if routing.shares:
        ratio = _measured_ratio(domains, routing)
    else:
        ratio = domains * reach_probability(experts / domains, experts, top_k) / top_k
    if routing.groups and routing.groups_per_token:
        reach = routing.groups_per_token * np.maximum(1.0, domains / routing.groups)
        ratio = np.minimum(ratio, reach / top_k)
    return np.minimum(ratio, 1.0)


def domain_load(imbalance: Number, domain: Number, size: Number) -> Number:
    """Load over the mean of the domain of so many ranks that holds the hottest of `size`, `imbalance` times the mean,
    where the others share the rest equally."""
    return (imbalance + (domain - 1) * (size - imbalance) / np.maximum(size - 1, 1)) / domain


def all_to_all(
    algorithm: str,
    group: Group,
    links: Links,
    rows: Number,
    row_bytes: Number,
    routing: AllToAllRouting,
    *,
    copy_s_per_byte: float = 0.0,
    metadata_bytes: float = METADATA_BYTES,
    phases: Phases = "overlapped",
    among: Iterable[str] = ALGORITHMS,
) -> AllToAllCost:
    """One dispatch, or one combine with pre-reduction where the algorithm deduplicates.

    rows: that one rank sends, tokens x top_k; row_bytes: of one, hidden x bytes per value; both may be arrays.
    metadata_bytes: beside a shared row for each of its choices, where it is and its weight; by default the executor's.
    copy_s_per_byte: reading and writing a byte once in the device's memory, for packing between levels.
    phases, where there are several levels: rows for the own node are sent `overlapped` with those between nodes or
    `sequential` before them, as a phase of their own (Algorithm 1), or `merged` with the level inside nodes that
    follows.
    among: what `auto` chooses from, the cheapest at each point. Raises ResourceModelError for another algorithm.
    """

    def one(name: str) -> AllToAllCost:
        return _cost(ALGORITHMS[name], group, links, rows, row_bytes, routing, copy_s_per_byte, metadata_bytes, phases)

    if algorithm == "auto":
        return _cheapest([one(name) for name in among])
    if algorithm not in ALGORITHMS:
        listed = ", ".join((*ALGORITHMS, "auto"))
        raise ResourceModelError(f"all_to_all={algorithm}: must be one of {listed}, for example flat")
    return one(algorithm)


class _Sent:
    """What an all-to-all sends by tier, added up phase by phase."""

    def __init__(self, group: Group, links: Links) -> None:
        self.group, self.links = group, links
        self.payload: list[Number] = [0.0] * len(TIERS)
        self.metadata: list[Number] = [0.0] * len(TIERS)
        self.messages: list[Number] = [0.0] * len(TIERS)

    def phase(
        self, tiers: Sequence[int], message: Number, beside: Number = 0.0, *, below: Number = 1, when: Number = True,
        hot: Number = 1.0,
    ) -> Number:  # fmt: skip
        """Seconds to send one message to each domain of `below` ranks among the peers of `tiers`.

        message, beside: payload and metadata bytes of one, from the mean rank; when: 0 or 1 by point, or by tier;
        hot: load of the hottest domain over the mean.
        """
        seconds: Number = 0.0
        for tier in tiers:
            chosen = when[tier] if isinstance(when, list) else when
            messages = self.group.peers[tier] / below * chosen
            wire = (message + beside) * hot
            seconds = seconds + messages * (self.links.latency_s[tier] + wire * self.links.s_per_byte[tier])
            self.messages[tier] = self.messages[tier] + messages
            self.payload[tier] = self.payload[tier] + messages * message
            self.metadata[tier] = self.metadata[tier] + messages * beside
        return seconds


def _cost(
    algorithm: Algorithm,
    group: Group,
    links: Links,
    rows: Number,
    row_bytes: Number,
    routing: AllToAllRouting,
    copy_s_per_byte: float,
    metadata_bytes: float,
    phases: Phases,
) -> AllToAllCost:
    dedup = algorithm.dedup
    size, node = group.size, group.within(NODE)
    nodes = size / node
    several = nodes > 1
    pair, beside = rows * row_bytes / size, rows * metadata_bytes / size * dedup  # bytes from a rank to another
    imbalance = np.clip(routing.imbalance, 1.0, size)
    left = dedup_ratio(nodes, routing) if dedup else 1.0
    sent = _Sent(group, links)
    hidden: Number = 0.0
    if algorithm.levels == 1:
        left = dedup_ratio(size, routing) if dedup else 1.0
        seconds = sent.phase((*NEAR, *FAR), left * pair, beside, hot=imbalance)
        copies = np.where(size > 1, 1.0, 0.0) * dedup  # each row is copied to the experts of its rank
    else:
        switch, rack = group.within(SWITCH), group.within(RACK)
        middle: Number = node
        if "rack" in algorithm.domains:
            middle = np.where((switch > node) & (switch < size), switch, np.where(rack < size, rack, node))
        third = middle > node
        inside = [group.within(tier) <= middle for tier in range(len(TIERS))]
        outside = [1 - within for within in inside]
        top = dedup_ratio(size / middle, routing) if dedup else 1.0
        between = sent.phase(
            FAR, top * middle * pair, middle * beside, below=middle, when=outside,
            hot=domain_load(imbalance, middle, size),
        ) + sent.phase(
            FAR, left * node * size / middle * pair, node * size / middle * beside, below=node, when=inside,
            hot=domain_load(imbalance, node, size),
        )  # fmt: skip
        if phases == "merged":
            seconds = between + sent.phase(NEAR, nodes * pair, hot=imbalance)
        else:
            own = sent.phase(NEAR, pair, hot=imbalance)
            hidden = np.minimum(own, between) * (phases == "overlapped")
            onward = sent.phase(NEAR, (nodes - 1) * pair, when=several, hot=imbalance)
            seconds = own + between - hidden + onward
        copies = 2.0 * (several & ((node > 1) | dedup)) + 2.0 * third
    return AllToAllCost(
        seconds=seconds + copies * size * pair * copy_s_per_byte,
        hidden_s=hidden,
        rows=tuple(payload / row_bytes for payload in sent.payload),
        payload_bytes=tuple(sent.payload),
        metadata_bytes=tuple(sent.metadata),
        messages=tuple(sent.messages),
        algorithm=list(ALGORITHMS).index(algorithm.name),
    )


def _cheapest(options: Sequence[AllToAllCost]) -> AllToAllCost:
    """At every point of the grid the option of fewest seconds, the first of equals."""
    shape = np.broadcast_shapes(*(np.shape(option.seconds) for option in options))
    best = np.argmin([np.broadcast_to(option.seconds, shape) for option in options], axis=0)

    def pick(values: Sequence[Number]) -> Number:
        return np.take_along_axis(np.stack([np.broadcast_to(value, shape) for value in values]), best[None], 0)[0]

    def by_tier(values: Sequence[Sequence[Number]]) -> tuple[Number, ...]:
        return tuple(pick(tier) for tier in zip(*values, strict=True))

    return AllToAllCost(
        seconds=pick([option.seconds for option in options]),
        hidden_s=pick([option.hidden_s for option in options]),
        rows=by_tier([option.rows for option in options]),
        payload_bytes=by_tier([option.payload_bytes for option in options]),
        metadata_bytes=by_tier([option.metadata_bytes for option in options]),
        messages=by_tier([option.messages for option in options]),
        algorithm=pick([option.algorithm for option in options]),
    )


def _measured_ratio(domains: Number, routing: AllToAllRouting) -> Number:
    """dedup_ratio for measured shares: by domain, and by every number of domains that occurs."""
    shares = np.asarray(routing.shares, dtype=np.float64)
    if len(shares) != routing.experts or shares.min() < 0 or shares.sum() <= 0:
        raise ResourceModelError(
            f"routing.shares: must be {routing.experts} popularities, one an expert, none negative and not all 0; "
            f"got {len(shares)} that sum to {shares.sum():g}"
        )
    shares = shares / shares.sum()
    counts, where = np.unique(np.asarray(domains), return_inverse=True)
    ratios = []
    for count in counts:
        # Experts stand in the order of their ranks; a fractional domain (of a group that does not nest) is rounded.
        domain = np.arange(routing.experts) * int(max(1, round(float(count)))) // routing.experts
        popularity = np.bincount(domain, weights=shares).astype(np.float64)
        reached = reach_probability(popularity * routing.experts, routing.experts, routing.top_k)
        ratios.append(reached.sum() / routing.top_k)
    return np.array(ratios)[where].reshape(np.shape(domains))
