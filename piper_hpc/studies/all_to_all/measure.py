"""The whole benchmark on the testbed: each machine brought up, measured by the ranks of a job, and taken down."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from piper_hpc.cluster import preset
from piper_hpc.config.errors import ConfigError
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder
from piper_hpc.runs.manifest import provenance
from piper_hpc.runs.status import Status
from piper_hpc.studies.all_to_all.rank import Part, Task, work
from piper_hpc.studies.all_to_all.stages import Stage
from piper_hpc.studies.jobs import ended
from piper_hpc.studies.testbed import TestbedError, brought_up
from piper_hpc.submit.executors import submit
from piper_hpc.testbed import state
from piper_hpc.testbed.network import congestion_control
from piper_hpc.testbed.options import flag

MPI = {"SLURM_MPI_TYPE": "pmi2", "UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
"""Without the latter two MPICH goes through shared memory: it takes the nodes, which share a host's name, for one."""

QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Else torch tells of every address without a name."""


class BenchError(RuntimeError):
    """The benchmark could not go on; the message is for its user. failure_class: see piper_hpc.runs.status."""

    def __init__(self, message: str, failure_class: str | None = None) -> None:
        self.failure_class = failure_class or "error"
        super().__init__(message)


def measure(run: RunFolder, stages: Sequence[Stage]) -> None:
    """All stages, one after the other, into the run's record; one that fails does not keep the others from it.

    Raises BenchError at the end where one failed.
    """
    run.write_manifest({"task": "bench-a2a", **provenance()})
    run.write_status(Status("running"))
    failed: list[BenchError] = []
    try:
        for stage in stages:
            try:
                with machine(stage):
                    run_stage(run, stage)
            except BenchError as error:
                print(f"error: {error}", file=sys.stderr)
                failed.append(error)
    except BaseException as error:
        cancelled = isinstance(error, KeyboardInterrupt)
        became, failure = ("cancelled", None) if cancelled else ("failed", "error")
        run.write_status(Status(became, failure_class=failure, reason=str(error) or type(error).__name__))
        raise
    if failed:
        reasons = "; ".join(map(str, failed))
        run.write_status(Status("failed", failure_class=failed[0].failure_class, reason=reasons))
        raise BenchError(reasons, failed[0].failure_class)
    run.write_status(Status("completed"))


@contextmanager
def machine(stage: Stage) -> Iterator[None]:
    """The stage's testbed, up for the length of a `with`. Raises BenchError where it cannot be."""
    flags = [word for key, value in stage.options.items() for word in (flag(key), f"{value:g}")]
    try:
        with brought_up(flags):
            yield
    except TestbedError as error:
        raise BenchError(f"{stage.name}: {error}") from error


def run_stage(run: RunFolder, stage: Stage) -> None:
    """The stage's parts by a job on the testbed that is up. Its logs and status are kept in a folder of its own below
    the run's; an interrupt cancels it. Raises BenchError where Slurm refuses it, or its ranks fail."""
    testbed = state.load()
    if testbed is None:
        raise BenchError(f"no testbed is up for {stage.name}: python -m piper_hpc.testbed up")
    mpi = stage.mpi and _mpi_loads()
    links = {kind: link.configured_bytes_per_s for kind, link in testbed.links.items()}
    facts = {key: testbed.options[key] for key in ("cpu_share", "period_us")}
    facts["congestion_control"] = congestion_control()
    parts = [part if mpi else _without_mpi(part) for part in stage.parts]
    stages = run.path / "stages"
    job = RunFolder.create(stages, f"stage-{len(list(stages.glob('stage-*')))}")
    Task(str(run.path), {"machine": stage.name, "link_bytes_per_s": links, **facts}, parts, mpi).write(job.path)
    try:
        submit(job, _cluster(stage, mpi), environment=testbed.environment, wait=True, placement={}, work=work)
    except ConfigError as error:
        raise BenchError(f"{stage.name}: {error}", "config") from error
    status = ended(job)
    if status.state != "completed":
        why = " ".join(word for word in (status.state, status.failure_class, status.reason) if word)
        raise BenchError(
            f"{stage.name}: {why}; logs are in {job.logs}, rows so far in {run.path}", status.failure_class
        )


def _cluster(stage: Stage, mpi: bool) -> ClusterConfig:
    """The testbed's configuration for a job of the whole stage."""
    return replace(
        preset.config("testbed"),
        nodes=int(stage.options["nodes"]),
        ranks_per_node=int(stage.options["ranks_per_node"]),
        time_min=15 + int(2 * sum(part.budget_s for part in stage.parts) / 60),
        environment=QUIET | (MPI if mpi else {}),
    )


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
