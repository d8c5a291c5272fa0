"""Chooses the calibration of a configuration and predicts its run; used by the launcher and by the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.cluster import data_sheet, evidence
from piper_hpc.cluster.machine import Machine
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import Calibration, Prediction, Routing

IMBALANCE_STEPS = 6
"""Further routings that are predicted: from balanced to all rows on one rank of an expert group."""


def calibration_of(experiment: Experiment, machine: Machine) -> Calibration | None:
    """The measured calibration where there is one, else the data sheet's, else None.

    Raises ConfigError for a file that is no calibration and for a data sheet that makes no sense.
    """
    cluster = experiment.cluster
    given = cluster.calibration not in ("auto", "off")
    cached = machine.calibration_file(cluster, experiment.train.dtype, experiment.runs)
    path = Path(cluster.calibration).expanduser() if given else cached
    if given or (cluster.calibration == "auto" and cached.exists()):
        try:
            return calibrations.load(path)
        except calibrations.CalibrationError as error:
            problem = Problem("cluster.calibration", str(path), str(error), "cluster.calibration=off")
            raise ConfigError(problem) from error
    try:
        return data_sheet.calibration_of_cluster(cluster, experiment.train.dtype)
    except ValueError as error:
        works = f"cluster={cluster.name}, with the values of its file"
        if isinstance(error, data_sheet.UnknownFact):
            works = error.example
        raise ConfigError(Problem("cluster.data_sheet", cluster.name, str(error), works)) from error


def stale_notes(
    experiment: Experiment, machine: Machine, calibration: Calibration, nodes: Sequence[str] = ()
) -> list[str]:
    """Why what was measured may no longer hold: other nodes, driver, library or version, or age; empty if it does."""
    if not calibration.measured:
        return []
    now = evidence.facts(machine, experiment.cluster, experiment.train.dtype, nodes)
    return [f"calibration: {reason}" for reason in calibrations.staleness(calibration, now)]


def forecast(
    experiment: Experiment, machine: Machine, calibration: Calibration, nodes: Sequence[str] = ()
) -> Prediction:
    """What the run will take, by the resource model: with the routing as configured, and beside it with others.

    `all_to_all=auto` selects for the configured routing; the others are predicted with the same algorithm. nodes: names
    of the allocated nodes, once the job has them; a note says where they differ from those that were measured.
    """
    assert experiment.layout is not None, "planning has chosen a layout before anything is predicted"
    cluster = machine.spec(experiment.cluster, calibration)
    model, workload = experiment.model, experiment.workload
    prediction = predict(model, cluster, experiment.layout, workload)
    taken = {stage["algorithm"] for stage in prediction.exchange["stages"]}
    layout = replace(experiment.layout, all_to_all=taken.pop()) if len(taken) == 1 else experiment.layout
    by_imbalance = []
    for imbalance in sorted({1 + (layout.ep - 1) * step / IMBALANCE_STEPS for step in range(IMBALANCE_STEPS + 1)}):
        other = predict(model, cluster, layout, replace(workload, routing=Routing(imbalance=imbalance)))
        by_imbalance.append(
            {
                "skew": imbalance,
                "step_time_s": other.step_time_s,
                "peak_memory_bytes": other.peak_memory_bytes,
                "terms": other.terms,
            }
        )
    return replace(
        prediction,
        notes=[*prediction.notes, *stale_notes(experiment, machine, calibration, nodes)],
        routing={"mode": workload.routing.mode, "skew": workload.routing.imbalance, "by_skew": by_imbalance},
    )
