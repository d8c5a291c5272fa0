"""The status of a run, from its record, its ranks' failure files, and the scheduler (squeue, sacct, or processes)."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.runs import RecordError, RunFolder, Status
from piper_hpc.runtime import quota
from piper_hpc.runtime.slurm import ask
from piper_hpc.submit.process import alive
from piper_hpc.submit.scheduler import CANCELLED, ENDED, FAILURES, PENDING, RUNNING, JobState, job_states

LAST_WORD_S = 1.0
"""How long the record of a job that is gone may take to reach whoever asks."""


def failure_status(run: RunFolder, status: Status, codes: dict[int, int] | None = None) -> Status:
    """The `failed` status, with class and reason, of a run whose processes all ended without writing one themselves.

    `codes` are exit codes by rank, where a parent saw them (negative: the signal that killed the rank).
    """
    # An attempt may end before it says that it runs: its logs tell of it, the status does not.
    attempt = max(status.attempt, run.newest_attempt())
    failures = run.failures(attempt)
    killed = sorted(rank for rank, code in (codes or {}).items() if code < 0)
    own = [failure for failure in failures if failure.failure_class != "comm"]
    if own and not killed:
        first = own[0]
        failure_class, reason = first.failure_class, f"rank {first.rank}: {first.reason}"
    elif killed and codes is not None:
        name = signal.Signals(-codes[killed[0]]).name
        failure_class, reason = "killed", f"rank {', '.join(map(str, killed))} was killed by {name}"
    elif failures:
        # Only lost peers spoke: who was lost ended without a word.
        silent = ", ".join(map(str, run.silent_ranks(attempt))) or "unknown"
        failure_class = "killed"
        reason = (
            f"ended without a word: rank {silent}; first to miss it was rank {failures[0].rank}: {failures[0].reason}"
        )
    else:
        failure_class, reason = "lost", f"the job ended without a word; see {run.logs}"
    return Status("failed", attempt, failure_class, reason, status.step)


def observe(run: RunFolder, known: Mapping[str, JobState] | None = None) -> Status:
    """The status as the scheduler sees it now; a run that ended unseen is recorded as what it became.

    known: what Slurm was found to say of jobs just now, where it was asked for many at once.
    """
    status, job = run.status(), run.job()
    if status.ended or not job:
        return status
    seen = _slurm(run, status, job, known) if job["scheduler"] == "slurm" else _local(run, status, job)
    if not seen.ended:
        return seen  # a job that lives speaks for itself: nobody else writes
    # Its last word may still be on its way, through a shared file system for example.
    deadline = time.monotonic() + LAST_WORD_S
    while time.monotonic() < deadline:
        latest = run.status()
        if latest.ended:
            return latest
        time.sleep(0.1)
    run.write_status(seen)
    return seen


def _local(run: RunFolder, status: Status, job: dict[str, Any]) -> Status:
    if job.get("host", platform.node()) != platform.node():
        return status  # its processes are not seen from here
    if alive(int(job["id"]), run.run_id):
        return status
    with contextlib.suppress(OSError):  # the supervisor died before it could; a rank may still be on its way out
        quota.remove_tree(run.run_id)
    return failure_status(run, status)


def _slurm(run: RunFolder, status: Status, job: dict[str, Any], known: Mapping[str, JobState] | None) -> Status:
    states = job_states([job["id"]], job["environment"]) if known is None else known
    if job["id"] not in states:
        return status
    said = states[job["id"]]
    if said.word in PENDING:
        reason = said.reason or None
        return Status("pending", status.attempt, None, reason, status.step)
    if said.word in RUNNING:
        return status if status.state == "running" else Status("running", status.attempt, step=status.step)
    if said.word in CANCELLED:
        return Status("cancelled", status.attempt, None, "cancelled in Slurm", status.step)
    if said.word in FAILURES:
        return Status("failed", status.attempt, FAILURES[said.word], f"Slurm says {said.word}", status.step)
    # A word that no list has ends nothing.
    return failure_status(run, status) if said.word in ENDED else status


def observe_all(runs: Sequence[RunFolder]) -> dict[str, JobState]:
    """What Slurm says of the jobs of all runs that have not ended, by one question for each Slurm; for `observe`."""
    asked: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        with contextlib.suppress(OSError, RecordError):
            job = run.job()
            if job and job["scheduler"] == "slurm" and not run.status().ended:
                asked.setdefault(tuple(sorted(job["environment"].items())), []).append(job["id"])
    return {
        job_id: state
        for environment, ids in asked.items()
        for job_id, state in job_states(ids, dict(environment)).items()
    }


def _scancel(job: dict[str, Any]) -> None:
    answer = ask(["scancel", job["id"]], job["environment"])
    if not answer.ok:
        rule = f"scancel failed: {answer.reason}"
        raise ConfigError(Problem("job", job["id"], rule, "the same command on a login node of its cluster"))


def cancel(run: RunFolder) -> Status:
    """End a run that is pending or running."""
    status, job = observe(run), run.job()
    if status.ended or not job:
        return status
    if job["scheduler"] == "slurm":
        _scancel(job)
    elif job.get("host", platform.node()) != platform.node():
        raise ConfigError(Problem("RUN", run.run_id, f"runs on {job['host']}", f"the same command on {job['host']}"))
    else:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.kill(int(job["id"]), signal.SIGINT)
    for _ in range(100):
        status = observe(run)
        if status.ended:
            break
        time.sleep(0.1)
    return status
