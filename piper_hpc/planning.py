"""Plans of a checked configuration: for the launcher, and at the end of a run to say what would have been faster."""

from __future__ import annotations

from dataclasses import dataclass, replace

from piper_hpc.cluster.machine import Machine
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.forecast import calibration_of
from piper_hpc.planner import Axes, Plan, plan
from piper_hpc.planner.engines import engine_of
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import RECIPES, ClusterSpec, Layout, Recipe, SpecError

MOST_RANKS = 64
"""Ranks up to which a finished run is planned for once more: a fraction of a second."""

LEAST_GAIN = 0.05
"""Gains below this are no more than what predictions are off by."""


@dataclass(frozen=True)
class Better:
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
        if experiment.task.recipe is None and fused and _multiplies(cluster, mixed):
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


def _multiplies(cluster: ClusterSpec, recipe: Recipe) -> bool:
    """Whether a rate of the recipe's matrix products is known of the cluster's device."""
    return cluster.accelerator is None or recipe.gemm_dtype in cluster.accelerator.peak_flops


def better_layout(experiment: Experiment, machine: Machine) -> Better | None:
    """The layout that parallelism=auto would take, if it is predicted to save over 5 % of the step of the one that ran.

    Both are predicted from what was measured; None without measurements, and for more ranks than a moment plans for.
    """
    ranks = experiment.cluster.nodes * experiment.cluster.ranks_per_node
    calibration = calibration_of(experiment, machine)
    if experiment.layout is None or ranks > MOST_RANKS or calibration is None or not calibration.measured:
        return None
    found = plan_of(replace(experiment, task=replace(experiment.task, candidates=1)), machine, "piper")
    cluster = machine.spec(experiment.cluster, calibration)
    this = predict(experiment.model, cluster, experiment.layout, experiment.workload).step_time_s
    if not found.candidates or found.candidates[0].step_time_s > (1 - LEAST_GAIN) * this:
        return None
    best = found.candidates[0]
    return Better(best.layout, best.step_time_s, this)
