"""What may reach a batch script: every string is refused or quoted, and secrets never get that far."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig, Config
from piper_hpc.spec.secrets import NOT_SHOWN, SECRET_NAME, has_secret, hidden

WORD = re.compile(r"[\w.,:;@=+/&|*!()\[\]%^-]+")
"""A value of an sbatch option as sites have them, constraints such as `gpu&hbm80g` included: no blank, quote or `$`."""
OPTION = re.compile(r"[a-z][a-z0-9-]*")
VARIABLE = re.compile(r"[A-Za-z_]\w*")
VALUES = ("partition", "account", "qos", "constraint", "mem", "gres", "exclude", "reservation")
"""Keys of `cluster` whose value an sbatch option of that name gets."""
DECIDED = {
    "nodes": "cluster.nodes", "ntasks-per-node": "cluster.ranks_per_node", "cpus-per-task": "cluster.cpus_per_task",
    "time": "cluster.time_min", "job-name": "the run", "output": "the run", "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue", "gpus-per-task": "cluster.gpus_per_task", "gpus-per-node": "cluster.gpus_per_node",
    "array": "a sweep (-m KEY=A,B), whose points share an array",
    **{name: f"cluster.{name}" for name in VALUES},
}  # fmt: skip
"""Options that have a key of their own, or are the run's."""
EXAMPLES = {"account": "abc123", "mem": "450G", "gres": "gpu:4", "constraint": "gpu", "exclude": "n[1-4]"}

KEPT = "is or has a secret, which script, configuration and record would keep: ranks inherit the launcher's variables"


def secrets(value: Any, key: str = "") -> Iterator[Problem]:
    """Every string of a configuration that carries a secret, whatever its key: script and record would keep it.

    value: of `key`, in plain types.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            below = f"{key}.{name}" if key else str(name)
            if key == "cluster.environment" and SECRET_NAME.search(str(name)):
                yield Problem(below, NOT_SHOWN, KEPT, f"export {name}=... before the command")
            else:
                yield from secrets(inner, below)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from secrets(inner, key)
    elif isinstance(value, str) and has_secret(value):
        yield Problem(key, NOT_SHOWN, KEPT, "export ...=... before the command, and the value without it")


def command_line(words: Sequence[str]) -> None:
    """Refuse words of a command that carry a secret: sweeps and records keep them. Raises ConfigError, which shows
    none."""
    found = [hidden(word) for word in words if has_secret(word)]
    if found:
        works = "export ...=... before the command"
        raise ConfigError(*(Problem(word.partition("=")[0], NOT_SHOWN, KEPT, works) for word in found))


def submission(config: Config) -> Iterator[Problem]:
    """Strings of `cluster` and `runs` that a script, a shell or the record would carry."""
    cluster = config.cluster
    yield from _variables(cluster)
    if cluster.scheduler != "slurm":
        return
    yield from _options(cluster)
    for module in cluster.modules:
        if not WORD.fullmatch(module):
            yield Problem("cluster.modules", module, "must be names of modules", "cluster.modules=[rocm/7.1.1]")
    for key, text in (("runs", config.runs), ("cluster.container", cluster.container or "")):
        if not text.isprintable():
            yield Problem(
                key, text, "must have no control character", f"{key}=runs" if key == "runs" else f"{key}=null"
            )


def _variables(cluster: ClusterConfig) -> Iterator[Problem]:
    for name, value in cluster.environment.items():
        key = f"cluster.environment.{name}"
        if not VARIABLE.fullmatch(name):
            rule = "must be the name of a variable: letters, digits and _"
            yield Problem("cluster.environment", name, rule, "+cluster.environment.NCCL_DEBUG=INFO")
        elif not str(value).isprintable():
            yield Problem(key, value, "must have no control character", f"{key}=INFO")


def _options(cluster: ClusterConfig) -> Iterator[Problem]:
    for name in VALUES:
        value = getattr(cluster, name)
        if value is not None and not WORD.fullmatch(value):
            rule = f"must be one word, as `#SBATCH --{name}=` takes it"
            yield Problem(f"cluster.{name}", value, rule, f"cluster.{name}={EXAMPLES.get(name, 'batch')}")
    for name, value in cluster.sbatch.items():
        key = f"cluster.sbatch.{name}"
        if not OPTION.fullmatch(name):
            rule = "must be the long name of an sbatch option, without dashes before it"
            yield Problem("cluster.sbatch", name, rule, "+cluster.sbatch.network=disable_rdzv_get")
        elif name in DECIDED:
            yield Problem(key, value, f"is decided by {DECIDED[name]}", f"~{key}")
        elif value is not None and not WORD.fullmatch(str(value)):
            yield Problem(key, value, "must be one word, or null for an option without a value", f"{key}=null")
    for name in cluster.wants:
        if not hasattr(cluster, name):
            yield Problem("cluster.wants", name, "must be a key of this group", "cluster.wants=[account]")
    if cluster.gpus_per_task and cluster.gpus_per_node:
        rule = "asks for the devices of cluster.gpus_per_node once more"
        yield Problem("cluster.gpus_per_task", cluster.gpus_per_task, rule, "cluster.gpus_per_task=0")
