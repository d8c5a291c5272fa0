"""From a composed configuration to what can be submitted: its layout chosen, its run predicted, its folder made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from piper_hpc.cluster.machine import Machine
from piper_hpc.cluster.placement import request
from piper_hpc.config import ConfigError, Experiment, Problem, check_experiment
from piper_hpc.config.identity import identity
from piper_hpc.forecast import calibration_notes, calibration_of, forecast
from piper_hpc.planner import Plan
from piper_hpc.planning import ScheduleChoice, plan_of, schedule_of
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.runs import RunFolder, Status
from piper_hpc.runs.folder import utc_now
from piper_hpc.runs.manifest import provenance
from piper_hpc.spec import AUTO, Layout, Prediction

Predictions = dict[str, tuple[Prediction | None, Sequence[str]]]
"""Predictions that were made, by all that they depend on: points that differ in their seed alone have one."""


@dataclass(frozen=True)
class Resolved:
    """A configuration whose layout is settled. identity: of the configuration as it was given; placement: the sbatch
    options that it asks for; schedule: what `parallelism.schedule=auto` took; notes: of the calibration."""

    composed: DictConfig
    experiment: Experiment
    identity: str
    placement: Mapping[str, str]
    prediction: Prediction | None
    notes: Sequence[str]
    schedule: ScheduleChoice | None = None


def resolve(
    composed: DictConfig, experiment: Experiment, machine: Machine, known: Predictions | None = None
) -> Resolved:
    """Plan where the layout or the schedule is open, then predict; known: predictions to take from, and to add to.

    Raises ConfigError where no layout fits, or what is asked for makes no sense on this machine.
    """
    own = identity(composed)
    composed, experiment, schedule = settle(composed, experiment, machine)
    placement = request(experiment.cluster, experiment.layout, machine.environment)
    prediction, notes = _predicted(experiment, machine, {} if known is None else known)
    return Resolved(composed, experiment, own, placement, prediction, notes, schedule)


def settle(
    composed: DictConfig, experiment: Experiment, machine: Machine
) -> tuple[DictConfig, Experiment, ScheduleChoice | None]:
    """The configuration with its layout and schedule chosen, where they were open. Raises ConfigError as `resolve`."""
    schedule = None
    if experiment.layout is None and experiment.task.name != "microbench":
        # The executor's own space: what it lacks cannot be trained.
        composed = with_layout(composed, _best(plan_of(experiment, machine, "piper")))
        experiment = check_experiment(composed)
    if experiment.layout is not None and experiment.layout.schedule == AUTO:
        schedule = schedule_of(experiment, machine)
        composed = _with(composed, schedule=schedule.layout.schedule, vpp=schedule.layout.vpp)
        experiment = check_experiment(composed)
    return composed, experiment, schedule


def _best(found: Plan) -> Layout:
    if not found.candidates:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in found.rejected.items())
        rule = f"no layout fits ({reasons})"
        raise ConfigError(Problem("parallelism", "auto", rule, "more cluster.nodes, or a smaller model"))
    return found.candidates[0].layout


def with_layout(composed: DictConfig, layout: Layout) -> DictConfig:
    """The configuration with a planned layout; the order of ranks is the user's, whatever the degrees."""
    return _with(composed, **asdict(layout) | {"auto": False, "placement": composed.parallelism.placement})


def _with(composed: DictConfig, **parallelism: Any) -> DictConfig:
    """The configuration with other values of `parallelism`."""
    merged = OmegaConf.merge(composed, OmegaConf.create({"parallelism": parallelism}))
    assert isinstance(merged, DictConfig)
    return merged


def _predicted(experiment: Experiment, machine: Machine, known: Predictions) -> tuple[Prediction | None, Sequence[str]]:
    """The prediction with its notes, or why there is none."""
    if experiment.task.name == "microbench":
        return None, ()
    asked = (experiment.model, experiment.layout, experiment.workload, experiment.cluster, experiment.train.dtype)
    key = repr((experiment.task.name, experiment.runs, asked))
    if key not in known:
        known[key] = _predict(experiment, machine)
    return known[key]


def _predict(experiment: Experiment, machine: Machine) -> tuple[Prediction | None, Sequence[str]]:
    calibration = calibration_of(experiment, machine)
    if calibration is None:
        return None, calibration_notes(experiment, machine, None)
    try:
        prediction = forecast(experiment, machine, calibration)
    except ResourceModelError as error:
        given = experiment.cluster.calibration
        raise ConfigError(Problem("cluster.calibration", given, str(error), "cluster.calibration=off")) from error
    return prediction, prediction.notes


def create_run(
    run: RunFolder,
    config: str,
    own_identity: str,
    machine: Machine,
    prediction: dict[str, Any] | None,
    mode: int,
    *,
    earlier: Sequence[dict[str, Any]] = (),
    sweep: dict[str, Any] | None = None,
    known_provenance: dict[str, Any] | None = None,
) -> RunFolder:
    """Make a run's folder, with all that is known before its job.

    config: as YAML; earlier: measured rows that it takes over; sweep: what it is a point of; known_provenance: where it
    was asked for already, as many runs of one command share it.
    """
    run = RunFolder.create(run.path.parent, run.run_id, mode)
    run.write_config(config)
    facts = {"identity": own_identity, "machine": asdict(machine)} | ({"sweep": sweep} if sweep else {})
    who = provenance() if known_provenance is None else known_provenance
    run.write_manifest({"run_id": run.run_id, "created": utc_now(), **who, **facts})
    if prediction is not None:
        run.write_prediction(prediction)
    for row in earlier:
        run.append_measurement(row, row["attempt"])
    run.write_status(Status("pending"))
    return run
