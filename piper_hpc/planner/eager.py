"""The search for executor=piper, on measured curves: branch and bound over all that it trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from piper_hpc.planner.balance import balanced_layers
from piper_hpc.planner.search_spec import (
    DUPLICATE,
    MEMORY_RELAXATION,
    NO_FIT,
    WRONG_MICRO_BATCHES,
    WRONG_VPP,
    RankedLayout,
    SearchResult,
    SearchSpec,
    domain_tier,
    pareto,
)
from piper_hpc.resource_model.eager.dispatch import pools
from piper_hpc.resource_model.eager.groups import TIERS, layout_groups
from piper_hpc.resource_model.eager.memory import rank_memories
from piper_hpc.resource_model.eager.pipeline import Held, alive_by_rank
from piper_hpc.resource_model.eager.predict import step_lower_bound_s, step_time_s
from piper_hpc.resource_model.eager.step import StepCost, StepPricer
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Recompute, Workload, executor
from piper_hpc.spec.rules import LAYERS, RULES, DegreeArrays
from piper_hpc.spec.schedules import SPLIT_BACKWARD, V_SHAPED, schedule_problem

RECOMPUTES_TWICE = "executor: recompute=full with a schedule that splits the backward"
TIED = "executor: one matrix is embedding and head, which must be in one stage"
NOT_TRAINED = "executor: no value of an axis of the search trains"


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

    A layout's step takes at least its busiest rank's work. One whose bound is beaten is not put on a timeline: it can
    be none of the best, nor on the front, nor the best inside Eq 10's domain, nor the best with more memory.
    """
    result = SearchResult()
    bounded = [(_bound(spec, candidate), candidate) for candidate in _candidates(spec, result.rejected)]
    in_domain: list[RankedLayout] = []
    with_more_memory: list[RankedLayout] = []
    for bound, candidate in sorted(bounded, key=lambda each: each[0].key):

        def beaten(known: list[RankedLayout], limit: RankedLayout = bound) -> bool:
            return bool(known) and known[-1].score < limit.score

        best_beats = len(result.best) >= spec.keep and beaten(result.best)
        on_front = candidate.fits and not any(_dominates(two, bound) for two in result.front)
        if best_beats and not on_front and (not candidate.in_domain or beaten(in_domain)) and beaten(with_more_memory):
            result.pruned += candidate.fits
            continue
        if not candidate.fits and beaten(with_more_memory):
            continue
        ranked = _ranked(spec, candidate, step_time_s(candidate.cost, spec.cluster))
        result.searched += 1
        with_more_memory = sorted([*with_more_memory, ranked], key=lambda entry: entry.key)[:1]
        if candidate.fits:
            result.fitting += 1
            result.best = sorted([*result.best, ranked], key=lambda entry: entry.key)[: spec.keep]
            result.front = pareto([*result.front, ranked])
            if candidate.in_domain:
                in_domain = sorted([*in_domain, ranked], key=lambda entry: entry.key)[:1]
    result.rejected = +result.rejected  # without rules that nothing broke
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
    pricer = StepPricer(spec.model, spec.cluster, spec.workload)
    eq10 = domain_tier(spec.cluster, "switch")
    if not (_trained(spec, "zero") and _trained(spec, "recompute")):
        rejected[NOT_TRAINED] += 1
    for ranks in spec.ranks:
        for degree in degrees(ranks):
            if degree.pp not in spec.axes.pp or degree.ep not in spec.axes.ep:
                continue
            rule = _broken_by_degrees(degree, spec.model, spec.cluster, spec.workload, spec.ep_domain)
            if rule is not None:
                rejected[rule] += 1
                continue
            in_domain = widest_tier(degree, spec.cluster) <= eq10
            for vpp, schedules in _pipelines(spec, degree, rejected):
                for layout, running in _shaped(spec, pricer, replace(degree, vpp=vpp), schedules, rejected):
                    yield from _fitting(spec, pricer, layout, running, in_domain, rejected)


def _pipelines(spec: SearchSpec, degree: Layout, rejected: Counter[str]) -> Iterator[tuple[int, list[str]]]:
    """vpp, and the schedules that run with it and place the stages alike; a single rank needs only one of them."""
    only = next((name for name in spec.axes.schedule if schedule_problem(name, 1, 1, 1) is None), None)
    for vpp in spec.axes.vpp:
        alike: dict[bool, list[str]] = {False: [], True: []}
        for schedule in spec.axes.schedule:
            if degree.pp * vpp > spec.model.layers:
                rejected[LAYERS] += 1
            elif schedule_problem(schedule, degree.pp, vpp, 2 * degree.pp) is not None:
                rejected[WRONG_VPP] += 1
            elif degree.pp == 1 and schedule != only:
                rejected[DUPLICATE] += 1
            else:
                alike[schedule in V_SHAPED].append(schedule)
        yield from ((vpp, schedules) for schedules in alike.values() if schedules)


def _shaped(
    spec: SearchSpec, pricer: StepPricer, degree: Layout, schedules: list[str], rejected: Counter[str]
) -> Iterator[tuple[Layout, list[str]]]:
    """Every micro-batch, recomputation, split of the layers and ZeRO stage of the degrees, as a layout of the first of
    the schedules that run with it, and these."""
    for micro_batch in divisors(spec.workload.global_batch // degree.dense_dp):
        if micro_batch not in spec.axes.micro_batch:
            continue
        sized = replace(degree, micro_batch=micro_batch, all_to_all=spec.all_to_all)
        count = sized.micro_batches(spec.workload.global_batch)
        runs = [name for name in schedules if schedule_problem(name, sized.pp, sized.vpp, count) is None]
        rejected[WRONG_MICRO_BATCHES] += len(schedules) - len(runs)
        for recompute in _trained(spec, "recompute"):
            whole = [name for name in runs if not Recompute.parse(recompute).full or name not in SPLIT_BACKWARD]
            rejected[RECOMPUTES_TWICE] += len(runs) - len(whole)
            if not whole:
                continue
            again = replace(sized, schedule=whole[0], recompute=recompute)
            for split in dict.fromkeys(((), balanced_split(pricer, again))):
                for zero in _trained(spec, "zero"):
                    if zero and sized.dense_dp == 1:
                        rejected[DUPLICATE] += len(whole)
                        continue
                    yield replace(again, stage_layers=split, zero=zero), whole


def balanced_split(pricer: StepPricer, layout: Layout) -> tuple[int, ...]:
    """The uneven split that embedding and head ask for."""
    if layout.stages == 1:
        return ()
    group = pricer.groups(layout).stages[0].experts

    commonest, _ = max(pricer.model.kinds(range(pricer.model.layers)), key=lambda each: each[1])

    def seconds(layers: int, first: bool = False, last: bool = False) -> float:
        chunk = pricer.chunk(layout, group, Held(((commonest, layers),), first, last))
        return chunk.forward_s + chunk.backward_s

    one = seconds(1)
    ends = seconds(1, first=True) - one, seconds(1, last=True) - one
    return balanced_layers(layout, pricer.model.layers, seconds(2) - one, *ends)


def _fitting(
    spec: SearchSpec,
    pricer: StepPricer,
    layout: Layout,
    schedules: list[str],
    in_domain: bool,
    rejected: Counter[str],
) -> Iterator[BoundedLayout]:
    """The layout under each schedule that fits, or does with more memory. They differ in what is alive at once."""
    cost = pricer.cost(layout)
    memories = rank_memories(spec.model, layout, spec.workload)
    kept = pools(cost, spec.model, layout, spec.workload)
    for schedule in schedules:
        same = schedule == layout.schedule
        scheduled = layout if same else replace(layout, schedule=schedule)
        alive = alive_by_rank(scheduled, cost.micro_batches)
        peak = max(
            memory.peak_bytes(moments) + pool for memory, moments, pool in zip(memories, alive, kept, strict=True)
        )
        fits = peak <= spec.cluster.memory_bytes
        if not fits:
            rejected[NO_FIT] += 1
        if fits or peak <= MEMORY_RELAXATION * spec.cluster.memory_bytes:
            own = cost if same else replace(cost, schedule=schedule)
            yield BoundedLayout(scheduled, own, step_lower_bound_s(own, spec.cluster), peak, fits, in_domain)


def _trained(spec: SearchSpec, axis: str) -> list[Any]:
    """Values of an axis that the executor has."""
    return [value for value in getattr(spec.axes, axis) if executor.trains_with(axis, value)]


def _broken_by_degrees(
    layout: Layout, model: ModelSpec, cluster: ClusterSpec, workload: Workload, ep_domain: str
) -> str | None:
    """The first rule that no micro-batch size can mend, or None: a micro-batch of one sequence is the least."""
    if layout.pp > model.layers:
        return LAYERS
    if model.tied_embeddings and layout.stages > 1:
        return TIED
    case = DegreeArrays.of(model, workload, replace(layout, micro_batch=1))
    broken = next((rule.text for rule in RULES if not rule.holds(case).all()), None)
    if broken is None and ep_domain != "none" and widest_tier(layout, cluster) > domain_tier(cluster, ep_domain):
        return f"Eq 10: expert groups must stay within ep_domain={ep_domain}"
    return broken


def widest_tier(layout: Layout, cluster: ClusterSpec) -> int:
    """Number of the widest tier that an expert group crosses."""
    return max(TIERS.index(stage.experts.tier) for stage in layout_groups(layout, cluster).stages)
