"""The prediction of one step of this project's executor: costs by rank, put on the pipeline's timeline (Eq 12)."""

from __future__ import annotations

from random import Random
from statistics import fmean
from typing import Any

from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.delays import DRAWS, unequal
from piper_hpc.resource_model.eager.dispatch import facts as exchange_facts
from piper_hpc.resource_model.eager.dispatch import pools
from piper_hpc.resource_model.eager.memory import memory_by_rank
from piper_hpc.resource_model.eager.step import StepCost, step_cost
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.extrapolation import notes
from piper_hpc.resource_model.flops import flops_per_token
from piper_hpc.resource_model.prediction import assemble
from piper_hpc.resource_model.schedule import Timeline, Times, simulate
from piper_hpc.spec import TERMS, ClusterSpec, Layout, ModelSpec, Prediction, Workload
from piper_hpc.spec.schedules import SPLIT_BACKWARD

TERM_ERROR = 0.15
"""Half width of the 90 % interval of what a term is off by however well its operators were measured: they are timed by
themselves, and the model composes them. To the hundredth the least that, with the scatter of measurements, held four
fifths of the steps and large terms in each of three runs of `make validate-testbed` (2026-11-30) before the one that
docs/validation.md reports."""
CORES_ARE_SHARED = "bubble_fraction: not applicable: ranks share cores, a waiting stage lends its core to the others"


def predict(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> Prediction:
    """Time by term, memory by rank and MFU of one step of `workload` under `layout`, priced by measured curves.

    Raises ResourceModelError for a layout that has no such step, and for a cluster without a peak rate or without any
    link where the layout needs one.
    """
    return predict_from_cost(step_cost(model, cluster, layout, workload), model, cluster, layout, workload)


def timeline(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> Timeline:
    """The pipeline of one step where all passes of a stage take as long, every rank with a device of its own; ranks are
    pipeline ranks."""
    return _steady(step_cost(model, cluster, layout, workload))


def predict_from_cost(
    cost: StepCost, model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload
) -> Prediction:
    """The prediction of a layout from the costs of its step, see `predict`."""
    curves = cost.curves
    terms = _terms(cost, cluster)
    if cluster.devices_share_cores:
        curves.note(CORES_ARE_SHARED)
    for note in notes(cluster):
        curves.note(note)
    step_time_s = sum(term.seconds for term in terms.values())
    step_flops = flops_per_token(model, workload.sequence) * workload.tokens
    return assemble(
        model,
        layout,
        workload,
        terms={term: cost.seconds for term, cost in terms.items()},
        mfu=step_flops / (curves.peak_flops * layout.ranks * step_time_s),
        memory=memory_by_rank(model, layout, workload, pools(cost, model, layout, workload)),
        bubble_fraction=None if cluster.devices_share_cores else terms["bubble_s"].seconds / step_time_s,
        intervals=_intervals(terms, step_time_s, workload, step_flops / (curves.peak_flops * layout.ranks), curves),
        calibration=_evidence(curves, terms),
        notes=list(curves.notes),
        exchange=exchange_facts(cost, model, layout, workload),
    )


def step_time_s(cost: StepCost, cluster: ClusterSpec) -> float:
    """Seconds of the step as `predict_from_cost` has them, without the rest of a prediction."""
    return sum(term.seconds for term in _terms(cost, cluster).values())


def step_lower_bound_s(cost: StepCost, cluster: ClusterSpec) -> float:
    """Lower bound of the step, in seconds: of any rank (StepCost.least_s), or the work of all on cores they share."""
    contention = _contention(cluster)
    if not cluster.devices_share_cores:
        return cost.least_s
    return max(cost.least_s, sum(cost.busy_s) * cost.copies / cluster.cores) / contention


def _contention(cluster: ClusterSpec) -> float:
    """How many times slower the curves are than one rank alone: they were measured on all ranks at once."""
    if not cluster.devices_share_cores:
        return 1.0
    if cluster.cores <= 0:
        raise ResourceModelError(
            f"cluster '{cluster.name}': devices_share_cores needs the cores they share, cores={cluster.cores:g}; "
            "give the number of cores, for example cores=2"
        )
    return max(1.0, cluster.ranks / cluster.cores)


def _steady(cost: StepCost) -> Timeline:
    return _play(cost, [stage.forward_s for stage in cost.stages], cost.backward_s)


def _unsteady(cost: StepCost) -> list[Timeline]:
    """The pipeline of some steps, in which each pass takes another time (delays)."""
    generator, count, forwards, backwards = Random(0), cost.micro_batches, [], []
    for stage, whole_s in zip(cost.stages, cost.backward_s, strict=True):
        forward_s2, backward_s2 = stage.variance_s2
        # Gradients of weights wait for nobody.
        weight_s = stage.weight_s if cost.schedule in SPLIT_BACKWARD else 0.0
        inputs = unequal(whole_s - weight_s, backward_s2, DRAWS * count, generator)
        forwards.append(unequal(stage.forward_s, forward_s2, DRAWS * count, generator))
        backwards.append([seconds + weight_s for seconds in inputs])
    steps = [slice(step * count, (step + 1) * count) for step in range(DRAWS)]
    return [_play(cost, [each[step] for each in forwards], [each[step] for each in backwards]) for step in steps]


def _play(cost: StepCost, forward_s: Times, backward_s: Times) -> Timeline:
    """The pipeline where every rank has a device of its own. Receives are posted ahead, so that a message moves when it
    is sent; torch computes an overlapped pair one part after the other."""
    messages = [message.seconds for message in cost.messages]
    return simulate(
        cost.schedule,
        len(cost.ranks),
        cost.micro_batches,
        forward_s,
        backward_s,
        weight_s=[stage.weight_s for stage in cost.stages],
        send_forward_s=messages,
        send_backward_s=messages,
        blocking=False,
        paired=False,
    )


def _arrival_s(cost: StepCost, pipeline: Timeline) -> float:
    """When all ranks have reduced their gradients, after their last backward: the latest, as they clip by one norm."""
    return max(end + rank.before_norm_s for end, rank in zip(pipeline.end_s, cost.ranks, strict=True))


def _terms(cost: StepCost, cluster: ClusterSpec) -> dict[str, Cost]:
    """Terms of the critical rank, which add up to the step."""
    steady = _steady(cost)
    arrival_s = _arrival_s(cost, steady)
    if any(sum(stage.variance_s2) for stage in cost.stages):
        # Never earlier than with equal passes (Jensen's inequality), whatever few draws say.
        arrival_s = max(arrival_s, fmean(_arrival_s(cost, each) for each in _unsteady(cost)))
    alone_s = arrival_s + max(rank.update.after_norm_s for rank in cost.ranks)
    critical = cost.critical_rank
    busy = cost.critical_terms
    terms = {term: busy.get(term, Cost()) for term in TERMS}
    terms["p2p_s"] = _rescaled_to(total(cost.messages), steady.p2p_s[critical])
    work = total(terms.values())
    terms["bubble_s"] = _rescaled_to(work, max(0.0, alone_s - work.seconds))
    return _on_shared_cores(terms, steady, cost, cluster) if cluster.devices_share_cores else terms


def _on_shared_cores(
    terms: dict[str, Cost], pipeline: Timeline, cost: StepCost, cluster: ClusterSpec
) -> dict[str, Cost]:
    """Terms of the critical rank when ranks compete for `cluster.cores`.

    The work of all ranks, each timed as if alone, over the cores bounds the step; so does the pipeline with a core for
    every rank. A critical rank that never waits is then slowed down as a whole.
    """
    contention = _contention(cluster)
    work_s = (sum(cost.busy_s) + sum(pipeline.p2p_s)) * cost.copies / contention
    alone_s = total(terms.values()).seconds / contention
    step_time_s = max(work_s / cluster.cores, alone_s)
    own = terms | {"bubble_s": Cost()}
    scale = step_time_s / total(own.values()).seconds
    return {term: seconds * scale for term, seconds in own.items()}


def _rescaled_to(cost: Cost, seconds: float) -> Cost:
    """`cost` rescaled to `seconds`, with the same relative interval."""
    return (
        Cost(seconds, {curve: 0.0 for curve in cost.half_widths})
        if not cost.seconds
        else cost * (seconds / cost.seconds)
    )


def _intervals(
    terms: dict[str, Cost], step_time_s: float, workload: Workload, mfu_seconds: float, curves: Curves
) -> dict[str, tuple[float, float]]:
    """90 % intervals of the step, its terms, tokens/s and MFU; empty on data sheets, which state no spread."""
    if not curves.calibration.measured:
        curves.note("intervals: none, the cluster is described by data sheets, which state no spread")
        return {}
    whole = {term: cost + Cost(0.0, {f"model/{term}": TERM_ERROR * cost.seconds}) for term, cost in terms.items()}
    low, high = total(whole.values()).interval
    intervals = {term: cost.interval for term, cost in whole.items()}
    intervals["step_time_s"] = (low, high)
    for name, seconds in (("tokens_per_s", workload.tokens), ("mfu", mfu_seconds)):
        intervals[name] = (seconds / high, seconds / low)
    return intervals


def _evidence(curves: Curves, terms: dict[str, Cost]) -> dict[str, Any]:
    """What the prediction rests on."""
    calibration = curves.calibration
    return {
        "source": calibration.source,
        "measured": calibration.measured,
        "measured_at": calibration.measured_at,
        "peak_flops": calibration.peak_flops,
        "provenance": dict(calibration.provenance),
        "rests_on": {term: cost.curves for term, cost in terms.items() if cost.curves},
        "extrapolated": {name: list(asked) for name, asked in sorted(curves.extrapolated.items())},
    }
