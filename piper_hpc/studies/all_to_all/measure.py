"""The whole benchmark on the testbed: each machine brought up, measured by real ranks under srun, and taken down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from piper_hpc.runs import RunFolder
from piper_hpc.runs.manifest import provenance
from piper_hpc.runs.status import Status
from piper_hpc.studies.all_to_all.rank import Part, Task
from piper_hpc.studies.all_to_all.stages import Stage
from piper_hpc.testbed.network import congestion_control
from piper_hpc.testbed.options import flag

TESTBED = (sys.executable, "-m", "piper_hpc.testbed")
ON_THE_LINKS = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
"""Without these MPICH goes through shared memory: it takes the nodes, which share a host's name, for one."""

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Else torch tells of every address without a name."""


class BenchError(RuntimeError):
    """The benchmark could not go on; the message is for its user."""


def measure(run: RunFolder, stages: Sequence[Stage]) -> None:
    """All stages, one after the other, into the run's record; one that fails does not keep the others from it.

    Raises BenchError at the end where one failed.
    """
    run.write_manifest({"task": "bench-a2a", **provenance()})
    run.write_status(Status("running"))
    failed: list[str] = []
    try:
        for stage in stages:
            try:
                with machine(stage) as testbed:
                    run_stage(run, stage, testbed)
            except BenchError as error:
                print(f"error: {error}", file=sys.stderr)
                failed.append(str(error))
    except BaseException as error:
        cancelled = isinstance(error, KeyboardInterrupt)
        state, failure = ("cancelled", None) if cancelled else ("failed", "error")
        run.write_status(Status(state, failure_class=failure, reason=str(error) or type(error).__name__))
        raise
    if failed:
        run.write_status(Status("failed", failure_class="error", reason="; ".join(failed)))
        raise BenchError("; ".join(failed))
    run.write_status(Status("completed"))


@contextmanager
def machine(stage: Stage) -> Iterator[dict[str, Any]]:
    """The stage's testbed, up for the length of a `with`; gives its record. Raises BenchError where it cannot be."""
    if not subprocess.run([*TESTBED, "status"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
        raise BenchError("a testbed is up already: python -m piper_hpc.testbed down")
    flags = [word for key, value in stage.options.items() for word in (flag(key), f"{value:g}")]
    try:
        answer = subprocess.run([*TESTBED, "up", *flags, "--json"], stdout=subprocess.PIPE, text=True, check=False)
        if answer.returncode:
            raise BenchError(f"the testbed of {stage.name} did not come up (see above)")
        yield json.loads(answer.stdout)
    finally:  # also where it was interrupted half way up
        subprocess.run([*TESTBED, "down"], stdout=subprocess.DEVNULL, check=False)


def run_stage(run: RunFolder, stage: Stage, testbed: dict[str, Any]) -> None:
    """The stage's parts under srun, on the testbed of this record, which is up. Raises BenchError where ranks fail."""
    mpi = stage.mpi and _mpi_loads()
    links = {kind: link["configured_bytes_per_s"] for kind, link in testbed["links"].items()}
    facts = {key: testbed["options"][key] for key in ("cpu_share", "period_us")}
    facts["congestion_control"] = congestion_control()
    parts = [part if mpi else _without_mpi(part) for part in stage.parts]
    task = Task(str(run.path), {"machine": stage.name, "link_bytes_per_s": links, **facts}, parts, mpi)
    path = run.path / f"task-{len(list(run.path.glob('task-*.json')))}.json"
    task.write(path)
    nodes, ranks = int(stage.options["nodes"]), int(stage.options["ranks_per_node"])
    budget_s = sum(part.budget_s for part in stage.parts)
    command = ["srun", f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--mpi={'pmi2' if mpi else 'none'}",
               "--kill-on-bad-exit=1", "--unbuffered", f"--time={15 + int(2 * budget_s / 60)}",
               sys.executable, "-m", "piper_hpc.studies.all_to_all.rank", str(path)]  # fmt: skip
    first = testbed["nodes"][0]["name"]
    environment = {
        **os.environ,
        **testbed["environment"],
        "MASTER_ADDR": first,
        **QUIET,
        **(ON_THE_LINKS if mpi else {}),
    }
    if subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False).returncode:
        raise BenchError(f"the ranks of {stage.name} failed (see above); rows so far are in {run.path}")


def _mpi_loads() -> bool:
    """Whether MPI can be started here; says why not. In a process of its own, as it can be started only once."""
    command = [sys.executable, "-c", "from piper_hpc.runtime import mpi; mpi.load()"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        print(f"MPI takes no part ({reason}): pip install mpi4py mpich", file=sys.stderr)
    return not answer.returncode


def _without_mpi(part: Part) -> Part:
    return replace(part, variants=[each for each in part.variants if each["algorithm"] != "mpi"])
