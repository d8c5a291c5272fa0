"""Chooses the calibration of a configuration and predicts its run; used by the launcher and by the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.cluster import catalogue, data_sheet, evidence
from piper_hpc.cluster.catalogue import Kept
from piper_hpc.cluster.machine import ACCELERATOR, Machine
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import AUTO, Calibration, Prediction, Routing

IMBALANCE_STEPS = 6
"""Further routings that are predicted: from balanced to all rows on one rank of an expert group."""


def calibration_of(experiment: Experiment, machine: Machine) -> Calibration | None:
    """The measured calibration where one serves this run, else the data sheet's, else None.

    With cluster.calibration=auto one of those kept, see catalogue.choose. Raises ConfigError for a file that is no
    calibration and for a data sheet that makes no sense.
    """
    cluster = experiment.cluster
    if cluster.calibration not in (AUTO, "off"):
        path = Path(cluster.calibration).expanduser()
        try:
            return calibrations.load(path)
        except calibrations.CalibrationError as error:
            raise _unreadable(str(path), error) from error
    chosen = _chosen(experiment, machine)[1] if cluster.calibration == AUTO else None
    if chosen is not None:
        return chosen.calibration
    try:
        return data_sheet.calibration_of_cluster(cluster, experiment.train.dtype)
    except ValueError as error:
        works = f"cluster={cluster.name}, with the values of its file"
        if isinstance(error, data_sheet.UnknownFact):
            works = error.example
        raise ConfigError(Problem("cluster.data_sheet", cluster.name, str(error), works)) from error


def _chosen(experiment: Experiment, machine: Machine) -> tuple[list[Kept], Kept | None]:
    """The calibrations that are kept of this cluster and device, and the one that serves the run."""
    cluster = experiment.cluster
    try:
        found = catalogue.kept(machine, cluster, experiment.train.dtype, experiment.runs)
    except calibrations.CalibrationError as error:
        raise _unreadable(cluster.calibration, error) from error
    return found, catalogue.choose(found, cluster.nodes, catalogue.needed_tiers(machine, cluster))


def _unreadable(given: str, error: calibrations.CalibrationError) -> ConfigError:
    return ConfigError(Problem("cluster.calibration", given, str(error), "cluster.calibration=off"))


def calibration_notes(
    experiment: Experiment, machine: Machine, calibration: Calibration | None, nodes: Sequence[str] = ()
) -> list[str]:
    """What to know of the calibration that was found: why it is this one, or that none serves and how to measure one;
    and why it may no longer hold (other nodes, driver, library or version, age)."""
    cluster, dtype = experiment.cluster, experiment.train.dtype
    found, chosen = _chosen(experiment, machine) if cluster.calibration == AUTO else ([], None)
    if calibration is None or not calibration.measured:
        # A plan for a machine that nobody measured is no surprise; one whose measurements do not serve it is.
        told = found if experiment.task.name == "plan" else dtype != "float64" and cluster.scheduler == "slurm"
        if not told or chosen is not None or cluster.calibration != AUTO:
            return []
        first = "this run measures before it trains; " if calibration is None else ""
        return [f"calibration: {_missing(experiment, machine, found)}; {first}{_command(experiment)}"]
    notes = []
    if chosen is not None and len(found) > 1 and chosen.nodes != cluster.nodes:
        others = ", ".join(str(each.nodes) for each in found)
        notes.append(
            f"of those measured on {others} nodes that on {chosen.nodes} is taken, which has most of the links that "
            "are needed, on the nearest number of nodes"
        )
    accelerator = machine.fingerprint.get(ACCELERATOR)
    if accelerator is not None and ACCELERATOR not in calibration.provenance:
        notes.append(f"its file is older than the names of devices in it, and is taken to be of {accelerator}")
    # Of another number of nodes the prediction speaks; then the names of nodes differ anyway.
    elsewhere = calibration.nodes not in (None, cluster.nodes)
    now = evidence.facts(machine, replace(cluster, nodes=calibration.nodes or cluster.nodes), dtype, nodes)
    if elsewhere:
        now.pop("nodes", None)
    return [f"calibration: {reason}" for reason in (*notes, *calibrations.staleness(calibration, now))]


def _missing(experiment: Experiment, machine: Machine, found: Sequence[Kept]) -> str:
    """Which links a run needs that no calibration of its cluster and device has."""
    cluster = experiment.cluster
    device = f" of {cluster.accelerator}" if cluster.accelerator else ""
    needed = ", ".join(catalogue.needed_tiers(machine, cluster))
    have = "".join(f"; that on {_nodes(each.nodes)} has {', '.join(each.tiers) or 'none'}" for each in found)
    return (
        f"none{device} on {cluster.name} with {cluster.ranks_per_node} ranks a node, in {experiment.train.dtype}, has "
        f"the links that are needed here ({needed}){have}"
    )


def _nodes(number: int) -> str:
    return f"{number} node{'s' if number != 1 else ''}"


def _command(experiment: Experiment) -> str:
    """How to measure the links of a cluster."""
    cluster = experiment.cluster
    words = [f"cluster={cluster.name}", f"cluster.nodes={cluster.nodes}", f"train.dtype={experiment.train.dtype}"]
    words += [f"cluster.accelerator={cluster.accelerator}"] if cluster.accelerator else []
    return (
        "any number of nodes with these links will do to measure them: python -m piper_hpc.launch task=microbench "
        + " ".join(words)
    )


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
        notes=[*prediction.notes, *calibration_notes(experiment, machine, calibration, nodes)],
        routing={"mode": workload.routing.mode, "skew": workload.routing.imbalance, "by_skew": by_imbalance},
    )
