"""Which calibration a configuration rests on, and what is predicted with it: asked by the launcher and by the job."""

from __future__ import annotations

from pathlib import Path

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.cluster import data_sheet
from piper_hpc.cluster.machine import Machine
from piper_hpc.config import Experiment
from piper_hpc.resource_model.predict import predict
from piper_hpc.spec import Calibration, Prediction


def calibration_of(experiment: Experiment, machine: Machine) -> Calibration | None:
    """The measured calibration where there is one, else the data sheet's, else None."""
    cluster = experiment.cluster
    if cluster.calibration not in ("auto", "off"):
        return calibrations.load(Path(cluster.calibration).expanduser())
    cached = machine.calibration_file(cluster, experiment.train.dtype, experiment.runs)
    if cluster.calibration == "auto" and cached.exists():
        return calibrations.load(cached)
    sheet = cluster.data_sheet
    if sheet is None:
        return None
    return data_sheet.calibration(
        peak_flops=sheet.peak_flops,
        gemm_efficiency=sheet.gemm_efficiency,
        memory_bytes_per_s=sheet.memory_bytes_per_s,
        links={tier: (link.latency_s, link.bytes_per_s) for tier, link in sheet.links.items()},
        host_op_s=sheet.host_op_s,
    )


def forecast(experiment: Experiment, machine: Machine, calibration: Calibration) -> Prediction:
    """What the run will take, by the resource model."""
    assert experiment.layout is not None, "planning has chosen a layout before anything is predicted"
    cluster = machine.spec(experiment.cluster, calibration)
    return predict(experiment.model, cluster, experiment.layout, experiment.workload)
