"""Plans of a checked configuration, for `task=plan` and for the hint of a faster layout at the end of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from piper_hpc.balance.planners import evened
from piper_hpc.cluster.machine import Machine
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.forecast import calibration_of
from piper_hpc.planner import Axes, Plan, plan
from piper_hpc.planner.engines import engine_of
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import AUTO, EXECUTIONS, RECIPES, ClusterSpec, Layout, Recipe, Routing, SpecError
from piper_hpc.spec.executor import missing_of_layout
from piper_hpc.spec.rules import layout_problems
from piper_hpc.spec.schedules import SCHEDULES

MAX_RANKS = 64
"""Most ranks for which a finished run is planned again: the search takes a fraction of a second."""

MIN_GAIN = 0.05
"""Smallest relative gain that is reported: smaller ones are within the error of predictions."""


@dataclass(frozen=True)
class FasterLayout:
    """A layout that is predicted to be faster than the one that ran: seconds of its step, and of that one's."""

    layout: Layout
    step_time_s: float
    this_step_time_s: float


def cluster_of(experiment: Experiment, machine: Machine) -> ClusterSpec:
    """The cluster with what is known of it. ConfigError where that is neither measurements nor a data sheet."""
    calibration = calibration_of(experiment, machine)
    if calibration is None:
        measure = f"measure it first: python -m piper_hpc.launch task=microbench cluster={experiment.cluster.name}"
        rule = f"planning needs measurements or a data sheet, and there is neither; {measure}"
        raise ConfigError(Problem("cluster", experiment.cluster.name, rule, "cluster=frontier"))
    return machine.spec(experiment.cluster, calibration)


def plan_of(experiment: Experiment, machine: Machine, executor: str) -> Plan:
    """The layouts of `executor` for an experiment, ranked. ConfigError where they have no price."""
    cluster, workload = cluster_of(experiment, machine), experiment.workload
    try:
        axes = Axes.of(vars(experiment.plan.axes))
        fused = engine_of(executor, cluster, axes).name != "piper"
        mixed = RECIPES["mixed_18"]
        if experiment.task.recipe is None and fused and _has_gemm_rate(cluster, mixed):
            # Fused executors keep fp32 sums and masters beside 16-bit weights, whatever this project would train in.
            workload = replace(workload, recipe=mixed)
        return plan(
            experiment.model,
            cluster,
            workload,
            ranks=experiment.task.ranks,
            rank_by=experiment.task.rank_by,
            ep_domain=experiment.task.ep_domain,
            candidates=experiment.task.candidates,
            executor=executor,
            axes=axes,
            all_to_all=experiment.all_to_all,
            memory_headroom=experiment.plan.memory_headroom,
        )
    except SpecError as error:
        raise ConfigError(*error.problems) from error
    except ResourceModelError as error:
        raise ConfigError(Problem("task.executor", executor, str(error), "task.executor=piper")) from error


@dataclass(frozen=True)
class ScheduleChoice:
    """The layout with the schedule that `parallelism.schedule=auto` takes, and seconds of a step predicted by schedule,
    each with its better vpp, fastest first. fits: whether they fit the memory; where none does, all are compared."""

    layout: Layout
    step_time_s: dict[str, float]
    fits: bool


def schedule_of(experiment: Experiment, machine: Machine) -> ScheduleChoice:
    """The schedule with the shortest predicted step of those that fit the memory, with the degrees as they are given.

    vpp is what is given, or where that is 1 also 2. ConfigError where nothing is known of the cluster, or no schedule
    runs with these degrees.
    """
    given, cluster = experiment.layout, cluster_of(experiment, machine)
    assert given is not None and given.schedule == AUTO
    model, workload = experiment.model, experiment.workload
    layouts = [
        replace(given, schedule=schedule, vpp=vpp)
        for schedule in SCHEDULES
        for vpp in ((1, 2) if given.vpp == 1 else (given.vpp,))
    ]
    broken = {
        layout: [*layout_problems(model, layout, workload), *missing_of_layout(layout, model)] for layout in layouts
    }
    runs = [layout for layout in layouts if not broken[layout]]
    if not runs:
        raise ConfigError(*broken[layouts[SCHEDULES.index("1f1b")]])
    predictions = [predict(model, cluster, layout, workload) for layout in runs]
    fitting = [one for one in predictions if max(one.peak_memory_bytes) <= cluster.memory_bytes]
    ranked = sorted(fitting or predictions, key=lambda one: one.step_time_s)
    step_time_s: dict[str, float] = {}
    for one in ranked:
        step_time_s.setdefault(one.layout.schedule, one.step_time_s)
    return ScheduleChoice(ranked[0].layout, step_time_s, bool(fitting))


@dataclass(frozen=True)
class BalancePrice:
    """What uneven routing costs a layout, and what experts that move would save of it.

    skew: the busiest rank's load over the mean; evened_skew: once experts have moved (balance.planners.evened); with
    seconds of a step at each. assumed: whether skew is ASSUMED_SKEW, as the routing that was given is even.
    """

    skew: float
    step_time_s: float
    evened_skew: float
    evened_step_time_s: float
    assumed: bool


ASSUMED_SKEW = 2.0
"""What imbalance is priced at where routing is taken to be even: real routers have 1.3 to 4 (arXiv 2606.04101)."""


def balance_of(found: Plan, experiment: Experiment, machine: Machine) -> BalancePrice | None:
    """Prices of imbalance for the best layout of a plan, with and without migration; None where no expert could move,
    or none is chosen freely."""
    best, model, workload = found.candidates[0], experiment.model, found.workload
    layout, routing = best.layout, found.workload.routing
    if layout.ep == 1 or model.experts in (0, layout.ep) or routing.mode != "dropless":
        return None
    assumed = float(routing.load(layout.ep)) <= 1
    if assumed:
        routing = Routing(imbalance=min(ASSUMED_SKEW, float(layout.ep)))
    cluster, even = cluster_of(experiment, machine), evened(routing, model.experts, layout.ep)
    uneven_s, even_s = (
        predict(model, cluster, layout, replace(workload, routing=each), EXECUTIONS[found.executor]).step_time_s
        for each in (routing, even)
    )
    return BalancePrice(float(routing.load(layout.ep)), uneven_s, float(even.load(layout.ep)), even_s, assumed)


def _has_gemm_rate(cluster: ClusterSpec, recipe: Recipe) -> bool:
    """Whether the device's peak rate of the recipe's matrix products is known, or no device is named."""
    return cluster.accelerator is None or recipe.gemm_dtype in cluster.accelerator.peak_flops


def better_layout(experiment: Experiment, machine: Machine) -> FasterLayout | None:
    """The layout that parallelism=auto would take, if it is predicted to save over 5 % of the step of the one that ran.

    Both are predicted from what was measured; None without measurements, and for more ranks than a moment plans for.
    """
    ranks = experiment.cluster.nodes * experiment.cluster.ranks_per_node
    calibration = calibration_of(experiment, machine)
    if experiment.layout is None or ranks > MAX_RANKS or calibration is None or not calibration.measured:
        return None
    found = plan_of(replace(experiment, task=replace(experiment.task, candidates=1)), machine, "piper")
    cluster = machine.spec(experiment.cluster, calibration)
    this = predict(experiment.model, cluster, experiment.layout, experiment.workload).step_time_s
    if not found.candidates or found.candidates[0].step_time_s > (1 - MIN_GAIN) * this:
        return None
    best = found.candidates[0]
    return FasterLayout(best.layout, best.step_time_s, this)
