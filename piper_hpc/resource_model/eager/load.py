"""Rows of the busiest rank of an expert group, and bytes of its busiest link, over the mean: by routing and padding."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from statistics import NormalDist

import numpy as np

from piper_hpc.resource_model.all_to_all import domain_load
from piper_hpc.resource_model.topology import NODE, Group
from piper_hpc.spec import AUTO, ClusterSpec, Layout, ModelSpec, Routing, Workload, get_algorithm


def busiest_load(model: ModelSpec, layout: Layout, workload: Workload) -> float:
    """Rows of the busiest rank over the mean, at least 1 on one rank."""
    if layout.ep > 1 and layout.all_to_all != AUTO and get_algorithm(layout.all_to_all).padded:
        return padded_load(model, workload.routing, layout.micro_batch * workload.sequence, layout.ep)
    return _routed_load(workload.routing, layout.ep)


@lru_cache(maxsize=256)
def _routed_load(routing: Routing, ep: int) -> float:
    return float(routing.load(ep))


def wire_load(load: float, group: Group, cluster: ClusterSpec) -> float:
    """Bytes over the busiest link of an expert group, over the mean, where its busiest rank has `load` times the mean's
    rows and the others alike.

    Inside a node links are a rank's own; a network card is shared by the ranks that are nearest to it, by all of a node
    where the cluster names no number.
    """
    inside = float(group.within(NODE))
    if inside >= group.size:
        return load
    topology = cluster.topology
    sharing = min(inside, (topology.ranks_per_nic if topology is not None else None) or inside)
    return float(domain_load(load, sharing, group.size))


@lru_cache(maxsize=256)
def padded_load(model: ModelSpec, routing: Routing, tokens: int, ep: int) -> float:
    """Rows of every rank where each block is as long as the largest of the group, over the mean without padding.

    A block is what one of `ep` sources, each with `tokens` tokens, sends one expert: about normal around its expert's
    share. Of the largest of all blocks, as if they were independent, the median counts. 1 where routing is forced even.
    """
    if routing.mode != "dropless":
        return 1.0
    experts, copies = model.experts, tokens * model.top_k
    skewed = np.full(experts, 1.0)
    if not routing.histogram and routing.imbalance > 1:
        skewed[: experts // ep] = routing.imbalance
    shares = np.array(routing.histogram or skewed, dtype=np.float64)
    shares /= shares.sum()
    mean, deviation = copies * shares, np.sqrt(np.maximum(copies * shares * (1 - shares), 1e-9))
    low, high = float(mean.max()), float((mean + 8 * deviation).max())
    while high - low > 0.01:
        middle = (low + high) / 2
        below = prod(map(NormalDist().cdf, ((middle - mean) / deviation).tolist())) ** ep
        low, high = (middle, high) if below < 0.5 else (low, middle)
    return min(high, tokens) * experts / copies
