"""The search for this project's own executor, priced by measured curves: its axes are pp, ep, dp and micro_batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from piper_hpc.planner.question import ROOMIER, Found, Question, Ranked, domain_tier, pareto
from piper_hpc.resource_model.eager.groups import TIERS, layout_groups
from piper_hpc.resource_model.eager.memory import peak_bytes
from piper_hpc.resource_model.eager.predict import finish, shortest_step_s
from piper_hpc.resource_model.eager.step import StepCost, step_cost
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Workload, executor
from piper_hpc.spec.rules import LAYERS, RULES, Case

NO_FIT = "Eq 11: peak memory must fit the rank's memory"


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
class Costed:
    """A layout whose step was costed and not yet put on a timeline; `bound_s`: no shorter than this."""

    layout: Layout
    cost: StepCost
    bound_s: float
    peak_bytes: int
    fits: bool
    inside: bool


def search(question: Question) -> Found:
    """Every layout that the executor has, those excluded that a bound proves to be of no interest.

    A layout's step takes at least its busiest stage's work. One whose bound is beaten is not put on a timeline: it can
    be none of the best, nor on the front, nor the best inside Eq 10's domain, nor the best with more memory.
    """
    found = Found()
    entries = sorted(_costed(question, found.rejected), key=lambda one: _bound(question, one).key)
    inside: list[Ranked] = []
    roomier: list[Ranked] = []
    for one in entries:
        bound = _bound(question, one)

        def beaten(known: list[Ranked], limit: Ranked = bound) -> bool:
            return bool(known) and known[-1].score < limit.score

        best_beats = len(found.best) >= question.keep and beaten(found.best)
        on_front = one.fits and not any(_dominates(two, bound) for two in found.front)
        if best_beats and not on_front and (not one.inside or beaten(inside)) and beaten(roomier):
            found.pruned += one.fits
            continue
        if not one.fits and beaten(roomier):
            continue
        prediction = finish(one.cost, question.model, question.cluster, one.layout, question.workload)
        ranked = _ranked(question, one, prediction.step_time_s)
        found.searched += 1
        roomier = sorted([*roomier, ranked], key=lambda entry: entry.key)[:1]
        if one.fits:
            found.fitting += 1
            found.best = sorted([*found.best, ranked], key=lambda entry: entry.key)[: question.keep]
            found.front = pareto([*found.front, ranked])
            if one.inside:
                inside = sorted([*inside, ranked], key=lambda entry: entry.key)[:1]
    found.inside, found.roomier = next(iter(inside), None), next(iter(roomier), None)
    return found


def _dominates(known: Ranked, bound: Ranked) -> bool:
    return (
        known.step_time_s <= bound.step_time_s
        and known.peak_bytes <= bound.peak_bytes
        and known.layout.ranks <= bound.layout.ranks
    )


def _ranked(question: Question, one: Costed, step_time_s: float) -> Ranked:
    score = float(question.score(one.layout.ranks, step_time_s, one.peak_bytes))
    return Ranked(score, step_time_s, one.peak_bytes, one.layout)


def _bound(question: Question, one: Costed) -> Ranked:
    return _ranked(question, one, one.bound_s)


def _costed(question: Question, rejected: Counter[str]) -> Iterator[Costed]:
    """Layouts that break no rule, or memory's by so little that more memory is asked about; others are counted."""
    model, cluster, workload, axes = question.model, question.cluster, question.workload, question.axes
    eq10 = domain_tier(cluster, "switch")
    for ranks in question.ranks:
        for degree in degrees(ranks):
            if degree.pp not in axes.pp or degree.ep not in axes.ep:
                continue
            rule = _broken_by_degrees(degree, model, cluster, workload, question.ep_domain)
            if rule is not None:
                rejected[rule] += 1
                continue
            inside = widest_tier(degree, cluster) <= eq10
            for micro_batch in divisors(workload.global_batch // degree.dense_dp):
                if micro_batch not in axes.micro_batch:
                    continue
                layout = replace(degree, micro_batch=micro_batch, all_to_all=question.all_to_all)
                if next(executor.missing_of_step(layout, workload), None) is not None:
                    rejected["schedule 1f1b: at least pp micro-batches a step"] += 1
                    continue
                peak = max(peak_bytes(model, layout, workload))
                fits = peak <= cluster.memory_bytes
                if not fits:
                    rejected[NO_FIT] += 1
                if fits or peak <= ROOMIER * cluster.memory_bytes:
                    cost = step_cost(model, cluster, layout, workload)
                    yield Costed(layout, cost, shortest_step_s(cost, cluster), peak, fits, inside)


def _broken_by_degrees(
    layout: Layout, model: ModelSpec, cluster: ClusterSpec, workload: Workload, ep_domain: str
) -> str | None:
    """The first rule that no micro-batch size can mend, or None: a micro-batch of one sequence is the least."""
    if layout.pp * layout.vpp > model.layers:
        return LAYERS
    case = Case.of(model, workload, replace(layout, micro_batch=1))
    broken = next((rule.text for rule in RULES if not rule.holds(case).all()), None)
    if broken is None and ep_domain != "none" and widest_tier(layout, cluster) > domain_tier(cluster, ep_domain):
        return f"Eq 10: expert groups must stay within ep_domain={ep_domain}"
    return broken


def widest_tier(layout: Layout, cluster: ClusterSpec) -> int:
    """Number of the widest tier that an expert group crosses."""
    return max(TIERS.index(stage.experts.tier) for stage in layout_groups(layout, cluster).stages)
