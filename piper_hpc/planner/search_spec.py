"""Input and result of a search over layouts, the interface of its engines, and the Pareto front."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from piper_hpc.planner.axes import Axes
from piper_hpc.spec import TIERS, ClusterSpec, Layout, ModelSpec, Prediction, Tier, Workload

RANK_BY = ("mfu", "tokens_per_s", "memory")
NO_FIT = "Eq 11: peak memory must fit the rank's memory"
"""By which both searches count what does not fit."""

DUPLICATE = "another name for a layout that is counted already"
WRONG_VPP = "schedule: needs another number of chunks a rank (vpp), or more than one stage"
WRONG_MICRO_BATCHES = "schedule: needs more micro-batches a step, or a multiple of pp"

EP_DOMAINS = ("none", "switch", "node")

MEMORY_RELAXATION = 1.25
"""The search also keeps the best layout for this many times the memory: what a plan's limits report on memory."""


@dataclass(frozen=True)
class SearchSpec:
    """What to search for: model, cluster, workload, axes, and the order.

    ranks: how many a layout may use, each a search of its own; keep: how many of the best to return; all_to_all: of
    every layout for this project's executor, which may be auto (others have it as an axis).
    """

    model: ModelSpec
    cluster: ClusterSpec
    workload: Workload
    axes: Axes
    ranks: tuple[int, ...]
    rank_by: str = "mfu"
    ep_domain: str = "none"
    keep: int = 100
    all_to_all: str = "flat"

    def score(self, ranks: int, step_time_s: Any, peak_bytes: Any) -> Any:
        """What is ranked, lower first. At a fixed workload MFU is the inverse of rank-seconds, tokens/s of seconds."""
        return {"mfu": ranks * step_time_s, "tokens_per_s": step_time_s, "memory": peak_bytes}[self.rank_by]


@dataclass(frozen=True)
class RankedLayout:
    """A layout with its score, step time (s) and peak memory of its fullest rank (bytes)."""

    score: float
    step_time_s: float
    peak_bytes: float
    layout: Layout

    @property
    def key(self) -> tuple[Any, ...]:
        """Order of a list: equal scores by step time, then by the layout, so that there is one order."""
        layout = self.layout
        degrees = (
            *(layout.ranks, layout.pp, layout.vpp, layout.ep, layout.etp, layout.tp, layout.cp, layout.dp),
            *(layout.zero, layout.micro_batch),
        )
        names = (layout.schedule, layout.recompute, layout.all_to_all, layout.placement, layout.stage_layers)
        return self.score, self.step_time_s, degrees, *names


@dataclass
class SearchResult:
    """Every combination of the axes is rejected (counted by the rule it breaks), fitting or pruned.

    searched: layouts with every term and every stage's memory evaluated; fitting: those of them that fit; pruned: fits,
    and a bound shows it is none of the best. best: best first;
    front: those of which none is both faster and smaller (nor on fewer ranks); in_domain: the best whose experts
    stay in the domain of Eq 10 (arXiv 2605.05049); with_more_memory: the best with MEMORY_RELAXATION times the memory.
    """

    searched: int = 0
    fitting: int = 0
    pruned: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    best: list[RankedLayout] = field(default_factory=list)
    front: list[RankedLayout] = field(default_factory=list)
    in_domain: RankedLayout | None = None
    with_more_memory: RankedLayout | None = None

    @property
    def feasible(self) -> int:
        """Layouts that break no rule."""
        return self.fitting + self.pruned


class Engine(Protocol):
    """One executor's search, and its prediction of one layout. rescore_count: how many of the best are simulated."""

    name: str
    rescore_count: int

    def search(self, spec: SearchSpec) -> SearchResult:
        """Every layout of the axes that the executor has."""
        ...

    def predict(self, spec: SearchSpec, layout: Layout) -> Prediction:
        """The full prediction of one layout."""
        ...

    def step_time_s(self, spec: SearchSpec, layout: Layout) -> float:
        """Seconds of the step, as `search` ranks by."""
        ...

    def expert_tier(self, spec: SearchSpec, layout: Layout) -> int:
        """Number of the widest tier that an expert group of the layout crosses."""
        ...

    def rescored(self, spec: SearchSpec, candidate: RankedLayout) -> RankedLayout:
        """The same layout with the step time of the schedule's simulation."""
        ...


def domain_tier(cluster: ClusterSpec, ep_domain: str) -> int:
    """Number of the widest tier that an expert group may cross: Eq 10 of arXiv 2605.05049 for `switch`.

    Where a machine knows racks and no switches, a rack is what one leaf switch joins; where it knows neither, nothing
    between a node and the system is a domain.
    """
    if ep_domain == "none":
        return TIERS.index(Tier.SYSTEM.value)
    if ep_domain == "node":
        return TIERS.index(Tier.NODE.value)
    known = cluster.topology
    if known is None or (known.rack and not known.switch):
        return TIERS.index(Tier.RACK.value)
    return TIERS.index(Tier.SWITCH.value if known.switch else Tier.NODE.value)


def pareto(points: list[RankedLayout]) -> list[RankedLayout]:
    """Points of which no other is as fast, as small and on as few ranks, and better in one; fastest first."""
    kept: list[RankedLayout] = []
    for one in sorted(points, key=lambda point: (point.step_time_s, point.peak_bytes, point.layout.ranks, point.key)):
        if not any(two.peak_bytes <= one.peak_bytes and two.layout.ranks <= one.layout.ranks for two in kept):
            kept.append(one)
    return kept


def front_indices(step_time_s: Any, peak_bytes: Any, known: list[RankedLayout]) -> Any:
    """Indices of points on the front of two equally long arrays, without most of those that `known` beats."""
    left = np.arange(len(step_time_s))
    for point in known[:: max(1, len(known) // 16)]:
        seconds, size = step_time_s[left], peak_bytes[left]
        left = left[(seconds < point.step_time_s) | (size < point.peak_bytes)]
    order = left[np.lexsort((step_time_s[left], peak_bytes[left]))]
    falling = step_time_s[order]
    return order[falling < np.minimum.accumulate(np.concatenate([[np.inf], falling[:-1]]))]
