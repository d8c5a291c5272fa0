"""The search for executor=piper, on measured curves: branch and bound over pp, ep, dp and micro_batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from piper_hpc.planner.search_spec import (
    MEMORY_RELAXATION,
    NO_FIT,
    RankedLayout,
    SearchResult,
    SearchSpec,
    domain_tier,
    pareto,
)
from piper_hpc.resource_model.eager.groups import TIERS, layout_groups
from piper_hpc.resource_model.eager.memory import peak_bytes
from piper_hpc.resource_model.eager.predict import predict_from_cost, step_lower_bound_s
from piper_hpc.resource_model.eager.step import StepCost, step_cost
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Workload
from piper_hpc.spec.rules import LAYERS, RULES, DegreeArrays


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def degrees(ranks: int) -> Iterator[Layout]:
    """Every (pp, ep, dp) with pp * ep * dp = ranks (Eq 7, with expert replicas as the third axis)."""
    for pp in divisors(ranks):
        for ep in divisors(ranks // pp):
            yield Layout(pp=pp, ep=ep, dp=ranks // (pp * ep))


@dataclass(frozen=True)
class BoundedLayout:
    """A layout whose step has costs and is not simulated yet; bound_s: lower bound of its step, in seconds."""

    layout: Layout
    cost: StepCost
    bound_s: float
    peak_bytes: int
    fits: bool
    in_domain: bool


def search(spec: SearchSpec) -> SearchResult:
    """Every layout that the executor has, those excluded that a bound proves to be of no interest.

    A layout's step takes at least its busiest stage's work. One whose bound is beaten is not put on a timeline: it can
    be none of the best, nor on the front, nor the best inside Eq 10's domain, nor the best with more memory.
    """
    result = SearchResult()
    by_bound = sorted(_candidates(spec, result.rejected), key=lambda candidate: _bound(spec, candidate).key)
    in_domain: list[RankedLayout] = []
    with_more_memory: list[RankedLayout] = []
    for candidate in by_bound:
        bound = _bound(spec, candidate)

        def beaten(known: list[RankedLayout], limit: RankedLayout = bound) -> bool:
            return bool(known) and known[-1].score < limit.score

        best_beats = len(result.best) >= spec.keep and beaten(result.best)
        on_front = candidate.fits and not any(_dominates(two, bound) for two in result.front)
        if best_beats and not on_front and (not candidate.in_domain or beaten(in_domain)) and beaten(with_more_memory):
            result.pruned += candidate.fits
            continue
        if not candidate.fits and beaten(with_more_memory):
            continue
        prediction = predict_from_cost(candidate.cost, spec.model, spec.cluster, candidate.layout, spec.workload)
        ranked = _ranked(spec, candidate, prediction.step_time_s)
        result.searched += 1
        with_more_memory = sorted([*with_more_memory, ranked], key=lambda entry: entry.key)[:1]
        if candidate.fits:
            result.fitting += 1
            result.best = sorted([*result.best, ranked], key=lambda entry: entry.key)[: spec.keep]
            result.front = pareto([*result.front, ranked])
            if candidate.in_domain:
                in_domain = sorted([*in_domain, ranked], key=lambda entry: entry.key)[:1]
    result.in_domain, result.with_more_memory = next(iter(in_domain), None), next(iter(with_more_memory), None)
    return result


def _dominates(known: RankedLayout, bound: RankedLayout) -> bool:
    return (
        known.step_time_s <= bound.step_time_s
        and known.peak_bytes <= bound.peak_bytes
        and known.layout.ranks <= bound.layout.ranks
    )


def _ranked(spec: SearchSpec, candidate: BoundedLayout, step_time_s: float) -> RankedLayout:
    score = float(spec.score(candidate.layout.ranks, step_time_s, candidate.peak_bytes))
    return RankedLayout(score, step_time_s, candidate.peak_bytes, candidate.layout)


def _bound(spec: SearchSpec, candidate: BoundedLayout) -> RankedLayout:
    return _ranked(spec, candidate, candidate.bound_s)


def _candidates(spec: SearchSpec, rejected: Counter[str]) -> Iterator[BoundedLayout]:
    """Layouts that break no rule, or memory's by so little that more memory is asked about; others are counted."""
    model, cluster, workload, axes = spec.model, spec.cluster, spec.workload, spec.axes
    eq10 = domain_tier(cluster, "switch")
    for ranks in spec.ranks:
        for degree in degrees(ranks):
            if degree.pp not in axes.pp or degree.ep not in axes.ep:
                continue
            rule = _broken_by_degrees(degree, model, cluster, workload, spec.ep_domain)
            if rule is not None:
                rejected[rule] += 1
                continue
            in_domain = widest_tier(degree, cluster) <= eq10
            for micro_batch in divisors(workload.global_batch // degree.dense_dp):
                if micro_batch not in axes.micro_batch:
                    continue
                layout = replace(degree, micro_batch=micro_batch, all_to_all=spec.all_to_all)
                peak = max(peak_bytes(model, layout, workload))
                fits = peak <= cluster.memory_bytes
                if not fits:
                    rejected[NO_FIT] += 1
                if fits or peak <= MEMORY_RELAXATION * cluster.memory_bytes:
                    cost = step_cost(model, cluster, layout, workload)
                    yield BoundedLayout(layout, cost, step_lower_bound_s(cost, cluster), peak, fits, in_domain)


def _broken_by_degrees(
    layout: Layout, model: ModelSpec, cluster: ClusterSpec, workload: Workload, ep_domain: str
) -> str | None:
    """The first rule that no micro-batch size can mend, or None: a micro-batch of one sequence is the least."""
    if layout.pp * layout.vpp > model.layers:
        return LAYERS
    case = DegreeArrays.of(model, workload, replace(layout, micro_batch=1))
    broken = next((rule.text for rule in RULES if not rule.holds(case).all()), None)
    if broken is None and ep_domain != "none" and widest_tier(layout, cluster) > domain_tier(cluster, ep_domain):
        return f"Eq 10: expert groups must stay within ep_domain={ep_domain}"
    return broken


def widest_tier(layout: Layout, cluster: ClusterSpec) -> int:
    """Number of the widest tier that an expert group crosses."""
    return max(TIERS.index(stage.experts.tier) for stage in layout_groups(layout, cluster).stages)
