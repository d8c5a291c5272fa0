"""Seconds of all-reduce, reduce-scatter and all-gather on a tiered machine, by alpha-beta costs.

Buffers are whole: what every rank holds before a reduce-scatter and after an all-gather. There is no efficiency in the
formulas: a Link's bytes_per_s is what collectives reach. Sources: ring, Patarasuk and Yuan, J. Parallel Distrib.
Comput. 69 (2009); reduce-scatter plus all-gather, Thakur, Rabenseifner and Gropp, IJHPCA 19 (2005); one stage a tier,
BlueConnect (Cho et al., MLSys 2019).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from piper_hpc.resource_model.topology import Group, Links, Number
from piper_hpc.spec import TIERS

Algorithm = Literal["ring", "hierarchical", "auto"]


def reduce_scatter_s(group: Group, links: Links, buffer_bytes: Number, algorithm: Algorithm = "auto") -> Number:
    """Seconds until every rank of `group` holds the sum of its 1/W of a buffer of `buffer_bytes`.

    ring: W - 1 steps, each as slow as the slowest link, of B / W bytes; through a link that leaves a domain each of
    its members carries one of as many rings, so that all NICs are used:
    (W - 1) a + max over tiers (W - 1) / W B b / (members inside the next nearer domain).
    hierarchical: tier by tier from near to far, between the n domains of each, with what is left of the buffer:
    sum over tiers (n - 1) (a + B / (W inside the tier) b). auto: the cheaper one.
    """
    if algorithm == "ring":
        return _ring(group, links, buffer_bytes)
    if algorithm == "hierarchical":
        return _hierarchical(group, links, buffer_bytes)
    return np.minimum(_ring(group, links, buffer_bytes), _hierarchical(group, links, buffer_bytes))


def all_gather_s(group: Group, links: Links, buffer_bytes: Number, algorithm: Algorithm = "auto") -> Number:
    """Seconds until every rank of `group` holds all W parts of `buffer_bytes`: a reduce-scatter, reversed."""
    return reduce_scatter_s(group, links, buffer_bytes, algorithm)


def all_reduce_s(group: Group, links: Links, buffer_bytes: Number, algorithm: Algorithm = "auto") -> Number:
    """Seconds until every rank of `group` holds the sum of all buffers: a reduce-scatter and an all-gather."""
    return 2 * reduce_scatter_s(group, links, buffer_bytes, algorithm)


def _ring(group: Group, links: Links, buffer_bytes: Number) -> Number:
    steps = group.size - 1
    latency: Number = 0.0
    slowest: Number = 0.0
    inside: Number = 1
    for tier in range(len(TIERS)):
        crossed = group.peers[tier] > 0
        latency = np.where(crossed, np.maximum(latency, links.latency_s[tier]), latency)
        slowest = np.maximum(slowest, crossed * links.s_per_byte[tier] / inside)
        inside = group.within(tier)
    return steps * (latency + buffer_bytes / group.size * slowest)


def _hierarchical(group: Group, links: Links, buffer_bytes: Number) -> Number:
    seconds: Number = 0.0
    inside: Number = 1
    for tier in range(len(TIERS)):
        wider = group.within(tier)
        domains = wider / inside
        seconds = seconds + (domains - 1) * (links.latency_s[tier] + buffer_bytes / wider * links.s_per_byte[tier])
        inside = wider
    return seconds
