"""Resuming a micro-benchmark (`task.resume`): which rows of an earlier run a new one may keep."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from piper_hpc.cluster.machine import ACCELERATOR, Machine
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.runs import RunFolder, understood
from piper_hpc.runs.manifest import versions
from piper_hpc.spec import BENCHMARK_VERSION

COMPARED = ("torch", "piper-hpc", "mpi4py")
"""Packages of another version measure another thing."""


def finished(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Cell -> row of what a wide suite measured and found right; what was refused is measured again."""
    return {str(row["cell"]): row for row in rows if row["correct"] and "cell" in row}


def resumed_rows(experiment: Experiment, machine: Machine) -> list[dict[str, Any]]:
    """The rows of the run that `task.resume` names, each with the id of that run; none where it names none.

    Raises ConfigError for a run that is not there, or that measured another cluster, type or version; RecordError where
    its record cannot be read.
    """
    given = experiment.task.resume
    if given is None:
        return []
    found = [path for path in (experiment.runs / given, Path(given).expanduser()) if (path / "manifest.json").is_file()]
    if not found:
        rule = f"is neither a run in {experiment.runs} nor the folder of one"
        raise ConfigError(Problem("task.resume", given, rule, "task.resume=null"))
    run = RunFolder(found[0])
    with understood(run):
        differences = _differences(run, experiment, machine)
        rows = finished(run.measurements())
    if differences:
        rule = f"measured something else: {'; '.join(differences)}"
        raise ConfigError(Problem("task.resume", given, rule, "task.resume=null"))
    return [row | {"resumed_from": run.run_id} for row in rows.values()]


def _differences(run: RunFolder, experiment: Experiment, machine: Machine) -> list[str]:
    manifest, config = run.manifest(), run.config()
    accelerator = config["cluster"].get("accelerator")
    then = {
        **({ACCELERATOR: str(accelerator)} if accelerator is not None else {}),  # older fingerprints lack it
        **{key: str(config["cluster"][key]) for key in ("name", "nodes", "ranks_per_node", "device")},
        "train.dtype": str(config["train"]["dtype"]),
        **{package: manifest["versions"].get(package) for package in COMPARED},
        **manifest["machine"]["fingerprint"],
    }
    now = {
        **{key: str(getattr(experiment.cluster, key)) for key in ("name", "nodes", "ranks_per_node", "device")},
        "train.dtype": experiment.train.dtype,
        **{package: versions().get(package) for package in COMPARED},
        **machine.fingerprint,
    }
    changed = [f"{key} was {then.get(key)} and is {value}" for key, value in now.items() if then.get(key) != value]
    old = {row["benchmark_version"] for row in run.measurements()} - {BENCHMARK_VERSION}
    if old:
        changed.append(f"benchmark_version was {', '.join(map(str, sorted(old)))} and is {BENCHMARK_VERSION}")
    return changed
