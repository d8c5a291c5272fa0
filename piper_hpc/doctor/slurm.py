"""Slurm as this host reaches it: commands, partition, accounting; and the same questions on compute nodes."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from piper_hpc.config.schema import ClusterConfig
from piper_hpc.doctor.finding import Finding, failed, ok, warning
from piper_hpc.doctor.host import PROBE
from piper_hpc.runtime.slurm import ask

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
NODES_TIMEOUT_S = 600.0
"""On compute nodes, the time in the queue included."""


def examine(cluster: ClusterConfig, environment: Mapping[str, str]) -> list[Finding]:
    """What a login node can tell. environment: what the scheduler's commands need."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return [failed("Slurm", f"no {', '.join(missing)} on the PATH", "log in to a node that can submit jobs")]
    return [*_controller(environment), *_partition(cluster, environment), *_accounting(environment)]


def _controller(environment: Mapping[str, str]) -> Iterator[Finding]:
    answer = ask(["scontrol", "show", "config"], environment)
    if not answer.ok:
        yield failed("Slurm", answer.reason, "the controller does not answer: ask the site, or set SLURM_CONF")
        return
    version = re.search(r"SLURM_VERSION\s*=\s*(\S+)", answer.text)
    yield ok("Slurm", version[1] if version else "answers")


def _partition(cluster: ClusterConfig, environment: Mapping[str, str]) -> Iterator[Finding]:
    answer = ask(["sinfo", "--noheader", "--format", "%R %a %l %D"], environment)
    if not answer.ok:
        yield failed("partition", answer.reason, "sinfo must answer")
        return
    rows = [line.split() for line in answer.text.splitlines() if len(line.split()) == 4]
    listed = ", ".join(dict.fromkeys(row[0] for row in rows))
    mine = [row for row in rows if cluster.partition in (None, row[0])]
    if not mine:
        yield failed("partition", f"no {cluster.partition}", f"cluster.partition= one of {listed}")
        return
    nodes = sum(int(row[3]) for row in mine if row[3].isdigit())
    found = f"{cluster.partition or listed}: {nodes} nodes, limit {mine[0][2]}"
    if nodes < cluster.nodes:
        yield failed("partition", found, f"cluster.nodes={nodes} at most")
    elif not any(row[1] == "up" for row in mine):
        yield failed("partition", f"{found}, not up", "another partition, or wait")
    else:
        yield ok("partition", found)


def _accounting(environment: Mapping[str, str]) -> Iterator[Finding]:
    if not ask(["sacct", "--noheader", "--allocations"], environment).ok:
        mend = "states of ended jobs come from the runs' own records then; nothing to do"
        yield warning("accounting", "sacct does not answer", mend)
    else:
        yield ok("accounting", "sacct answers")


def on_nodes(cluster: ClusterConfig, environment: Mapping[str, str], runs: Path) -> list[Finding]:
    """What compute nodes say of themselves, every node of a job of `cluster.nodes`, and whether they see `runs`."""
    runs.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=runs, prefix=PROBE) as probe:
        words = ["srun", "--quiet", f"--nodes={cluster.nodes}", "--ntasks-per-node=1", "--time=5"]
        words += [f"--{key}={value}" for key in ("partition", "account", "qos", "constraint", "mem", "gres")
                  if (value := getattr(cluster, key))]  # fmt: skip
        words += [f"--gpus-per-node={cluster.gpus_per_node}"] * bool(cluster.gpus_per_node)
        command = [sys.executable, "-m", "piper_hpc.doctor", "--of-node", probe.name, f"cluster={cluster.name}"]
        answer = ask([*words, *command], environment, NODES_TIMEOUT_S)
    found = [Finding(**json.loads(line)) for line in answer.text.splitlines() if line.startswith("{")]
    answered = {each.where for each in found}
    if len(answered) < cluster.nodes:
        why = answer.reason or "srun ended well"
        mend = "compute nodes must see this Python and this folder: install on a shared file system"
        found.append(
            failed(
                "compute nodes",
                f"{len(answered)} of {cluster.nodes} answered ({why})",
                mend,
            )
        )
    return found
