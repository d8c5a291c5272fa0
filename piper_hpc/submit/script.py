"""Batch scripts: a site's template with its `#SBATCH` directives and its command filled in. Pure text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from piper_hpc.config.schema import ClusterConfig
from piper_hpc.paths import data_folder
from piper_hpc.runs import RunFolder


def directives(cluster: ClusterConfig, run: RunFolder, placement: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sbatch options that the configuration decides; `placement`: those of cluster.placement.request."""
    values = {
        "job-name": f"piper-{run.run_id}",
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.ranks_per_node),
        "cpus-per-task": str(cluster.cpus_per_task),
        "time": str(cluster.time_min),
        "output": str(run.logs / "slurm-%j.out"),
    }
    if cluster.partition:
        values["partition"] = cluster.partition
    if cluster.account:
        values["account"] = cluster.account
    if cluster.gpus_per_task:
        values["gpus-per-task"] = str(cluster.gpus_per_task)
    return values | dict(placement or {})


def render(
    template: str, values: dict[str, str], python: str, command: str, variables: dict[str, str] | None = None
) -> str:
    """Put `values` into the template's directives, and the command and `variables` before its first other line.

    A directive that the template has is replaced in its place; one that it lacks joins the end of the block. The
    template's body stays as its author wrote it, so that the same file serves by hand.
    """
    lines = template.splitlines()
    left = dict(values)
    last = 0
    for index, line in enumerate(lines):
        if line.startswith("#SBATCH --"):
            last = index
            key = line.removeprefix("#SBATCH --").split("=")[0].split()[0]
            if key in left:
                lines[index] = _directive(key, left.pop(key))
    added = [_directive(key, value) for key, value in left.items()]
    command_lines = [
        f"export SUBMITIT_EXECUTOR=slurm PIPER_PYTHON={shlex.quote(python)}",
        f"PIPER_COMMAND={shlex.quote(command)}",
    ]
    command_lines += [f"export {key}={shlex.quote(value)}" for key, value in sorted((variables or {}).items())]
    return "\n".join([*lines[: last + 1], *added, *command_lines, *lines[last + 1 :]]) + "\n"


def _directive(key: str, value: str) -> str:
    return f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}"


def template_of(cluster: ClusterConfig) -> Path:
    """The site's template."""
    assert cluster.template is not None, "checked by config.checks.paths"
    return data_folder("sbatch_templates") / cluster.template


def script(
    cluster: ClusterConfig, run: RunFolder, python: str, command: str, placement: Mapping[str, str] | None = None
) -> str:
    """The batch script of one run: what is submitted, and what `dry_run=true` prints."""
    template = template_of(cluster).read_text()
    return render(template, directives(cluster, run, placement), python, command, cluster.environment)
