"""Batch scripts: a site's template with its `#SBATCH` directives and its command filled in. Pure text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.config.slurm_checks import VALUES, WORD
from piper_hpc.paths import batch_template
from piper_hpc.runs import RunFolder

AFTER = "piper_hpc.submit.after"
SIGNAL_S = 120
"""How long before its time limit Slurm sends a job's ranks SIGUSR1, and at some sites once it is preempted."""
SIGNAL_LEAST_LIMIT_S = 600
"""Shorter jobs get no such signal: it comes up to a minute early, and one at the start would end them."""


def directives(cluster: ClusterConfig, run: RunFolder, placement: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sbatch options that the configuration decides; `placement`: those of cluster.placement.request."""
    values = {
        "job-name": f"piper-{run.run_id}",
        "nodes": str(cluster.nodes),
        "ntasks-per-node": str(cluster.ranks_per_node),
        "cpus-per-task": str(cluster.cpus_per_task),
        "time": str(cluster.time_min),
        "output": str(run.logs).replace("%", "%%") + "/slurm-%j.out",
    }
    values |= {name: value for name in VALUES if (value := getattr(cluster, name))}
    for name in ("gpus_per_task", "gpus_per_node"):
        if count := getattr(cluster, name):
            values[name.replace("_", "-")] = str(count)
    requeue = cluster.requeue if cluster.requeue is not None else {"requeue": True, "chain": False}.get(cluster.go_on)
    if requeue is not None:
        values["requeue" if requeue else "no-requeue"] = ""
    if 60 * cluster.time_min >= SIGNAL_LEAST_LIMIT_S:
        values["signal"] = f"USR1@{SIGNAL_S}"
    values |= {name: "" if value is None else str(value) for name, value in cluster.sbatch.items()}
    return values | dict(placement or {})


def render(
    template: str,
    values: dict[str, str],
    python: str,
    command: str,
    variables: dict[str, str] | None = None,
    modules: Sequence[str] = (),
    at_exit: str | None = None,
) -> str:
    """Put `values` into the template's directives; and the command, `variables` and what loads `modules` before its
    first other line.

    A directive that the template has is replaced in its place; one that it lacks joins the end of the block. The
    template's body stays as its author wrote it, so that the same file serves by hand. command: words that the shell
    has yet to read; at_exit: what it does last, however the job ends.
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
        f"export PIPER_PYTHON={shlex.quote(python)}",
        f"PIPER_COMMAND={shlex.quote(command)}",
    ]
    command_lines += [f"export {key}={shlex.quote(value)}" for key, value in sorted((variables or {}).items())]
    command_lines += [f"trap {shlex.quote(at_exit)} EXIT"] if at_exit else []
    command_lines += [f"module load {shlex.join(modules)}"] * bool(modules)
    return "\n".join([*lines[: last + 1], *added, *command_lines, *lines[last + 1 :]]) + "\n"


def _directive(key: str, value: str) -> str:
    """sbatch reads a line's words as a shell does, so that quotes keep a folder with a blank in one piece."""
    if value and not WORD.fullmatch(value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}"


def template_of(cluster: ClusterConfig) -> Path:
    """The site's template."""
    found = batch_template(cluster.template or "")
    assert found is not None, "checked by config.checks.paths"
    return found


def script(
    cluster: ClusterConfig, run: RunFolder, python: str, command: str, placement: Mapping[str, str] | None = None
) -> str:
    """The batch script of one run: what is submitted, and what `dry_run=true` prints."""
    template = template_of(cluster).read_text()
    contained = f"{cluster.container} {command}" if cluster.container else command
    values = directives(cluster, run, placement)
    at_exit = None if cluster.go_on == "off" else shlex.join([python, "-m", AFTER, str(run.path)])
    return render(template, values, python, contained, cluster.environment, cluster.modules, at_exit)


_STEP = re.compile(r'^eval "(srun\b.*?) \$PIPER_COMMAND"$', re.MULTILINE)


def pool_script(
    cluster: ClusterConfig,
    folder: RunFolder,
    python: str,
    command: str,
    tasks: int,
    placement: Mapping[str, str] | None = None,
) -> str:
    """The batch script of a job array whose tasks run `command` once, outside of srun, and steps by `$PIPER_STEP`.

    folder: whose name the array has, and where it prints. Raises ConfigError for a template without the line that
    starts ranks, as it is then not known how steps are started.
    """
    template = template_of(cluster)
    text = template.read_text()
    if not _STEP.search(text):
        rule = 'has no line `eval "srun ... $PIPER_COMMAND"`, by which a sweep starts its steps'
        raise ConfigError(Problem("cluster.template", str(template), rule, "cluster.template=generic.sbatch"))
    text = _STEP.sub(r'export PIPER_STEP="\1"\neval "$PIPER_COMMAND"', text)
    values = directives(cluster, folder, placement) | {
        "array": f"0-{tasks - 1}",
        "output": str(folder.logs).replace("%", "%%") + "/pool-%A_%a.out",
    }
    return render(text, values, python, command, cluster.environment, cluster.modules)
