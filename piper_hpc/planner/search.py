"""The search: every layout that satisfies the constraints, the best of them predicted in full and ranked."""

from __future__ import annotations

import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from piper_hpc.planner.constraints import (
    EP_DOMAINS,
    broken_by_degrees,
    broken_by_micro_batch,
    degrees,
    divisors,
)
from piper_hpc.resource_model.memory import peak_bytes
from piper_hpc.resource_model.predict import finish, shortest_step_s
from piper_hpc.resource_model.step import StepCost, step_cost
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Prediction, Workload

SCHEMA_VERSION = 1

Score = Callable[[Layout, float], float]
"""What is ranked, lower first, from a layout and its step time; it must not fall when the step gets longer."""

Key = tuple[float, tuple[int, ...]]
"""A score, then the degrees: equal scores keep one order."""


@dataclass(frozen=True)
class Plan:
    """Layouts ranked by prediction, best first, and what became of the others.

    Every layout is either rejected (counted by the rule it breaks) or feasible; a feasible one is either searched
    (every term and every stage's memory evaluated) or pruned (its busiest stage alone takes longer than the step of
    every candidate, so it cannot be one).
    """

    model: dict[str, Any]
    cluster: str
    workload: Workload
    rank_by: str
    searched: int
    pruned: int
    feasible: int
    seconds: float
    candidates: list[Prediction]
    rejected: dict[str, int]

    def document(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "cluster": self.cluster,
            "global_batch": self.workload.global_batch,
            "sequence": self.workload.sequence,
            "rank_by": self.rank_by,
            "searched": self.searched,
            "pruned": self.pruned,
            "feasible": self.feasible,
            "seconds": self.seconds,
            "candidates": [candidate.document() for candidate in self.candidates],
            "rejected": self.rejected,
        }


def plan(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    *,
    ranks: Sequence[int] | None = None,
    rank_by: str = "mfu",
    ep_domain: str = "none",
    candidates: int = 20,
) -> Plan:
    """Rank the layouts of `model` on `cluster` for `workload`, the best `candidates` of them in full.

    ranks: how many ranks a layout may use (default: all of the cluster, none fewer); rank_by: mfu, tokens_per_s or
    memory (the least peak first); ep_domain: none, switch or node, how far an expert group may reach (Eq 10). Nothing
    feasible is no error: there are no candidates then. Raises ValueError for an unknown option, and
    ResourceModelError for a cluster that nothing is known of.
    """
    started = time.perf_counter()
    if ep_domain not in EP_DOMAINS:
        raise ValueError(f"ep_domain={ep_domain!r}: must be one of {', '.join(EP_DOMAINS)}, for example ep_domain=none")
    score = _score(rank_by, model, workload)
    rejected: Counter[str] = Counter()
    layouts = list(_feasible(model, cluster, workload, ranks or [cluster.ranks], ep_domain, rejected))

    bounded: list[tuple[Key, Layout, StepCost]] = []
    for layout in layouts:
        cost = step_cost(model, cluster, layout, workload)
        bounded.append((_key(score(layout, shortest_step_s(cost, cluster)), layout), layout, cost))
    bounded.sort(key=lambda entry: entry[0])

    best: list[tuple[Key, Prediction]] = []
    searched = 0
    for bound, layout, cost in bounded:
        if len(best) >= candidates and bound[0] > best[candidates - 1][0][0]:
            break
        prediction = finish(cost, model, cluster, layout, workload)
        insort(best, (_key(score(layout, prediction.step_time_s), layout), prediction), key=lambda entry: entry[0])
        searched += 1
    return Plan(
        model={"name": model.name, "parameters": model.parameters, "active_parameters": model.active_parameters},
        cluster=cluster.name,
        workload=workload,
        rank_by=rank_by,
        searched=searched,
        pruned=len(layouts) - searched,
        feasible=len(layouts),
        seconds=time.perf_counter() - started,
        candidates=[prediction for _, prediction in best[:candidates]],
        rejected=dict(sorted(rejected.items())),
    )


def _feasible(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    ranks: Sequence[int],
    ep_domain: str,
    rejected: Counter[str],
) -> Iterator[Layout]:
    """Layouts that break no rule; the others are counted in `rejected`, by rule."""
    for count in sorted(set(ranks)):
        if not 0 < count <= cluster.ranks:
            raise ValueError(f"ranks={count}: cluster '{cluster.name}' has {cluster.ranks}; use ranks={cluster.ranks}")
        for layout in degrees(count):
            rule = broken_by_degrees(layout, model, cluster, workload, ep_domain)
            if rule is not None:
                rejected[rule] += 1
                continue
            for micro_batch in divisors(workload.global_batch // layout.dense_dp):
                candidate = replace(layout, micro_batch=micro_batch)
                rule = broken_by_micro_batch(candidate, model, cluster, workload)
                if rule is None:
                    yield candidate
                else:
                    rejected[rule] += 1


def _score(rank_by: str, model: ModelSpec, workload: Workload) -> Score:
    scores: dict[str, Score] = {
        # MFU at a fixed workload is the inverse of rank-seconds, tokens/s that of seconds.
        "mfu": lambda layout, step_time_s: layout.ranks * step_time_s,
        "tokens_per_s": lambda layout, step_time_s: step_time_s,
        "memory": lambda layout, step_time_s: max(peak_bytes(model, layout, workload)),
    }
    if rank_by not in scores:
        raise ValueError(f"rank_by={rank_by!r}: must be one of {', '.join(scores)}, for example rank_by=mfu")
    return scores[rank_by]


def _key(score: float, layout: Layout) -> Key:
    return score, (layout.ranks, layout.pp, layout.ep, layout.dp, layout.micro_batch)
