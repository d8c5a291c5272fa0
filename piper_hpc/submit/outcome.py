"""The status of a run, from its record, its ranks' failure files, and the scheduler (squeue, sacct, or processes)."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.runs import ECHOES, Failure, RecordError, RunFolder, Status
from piper_hpc.runtime import memory_kills, quota
from piper_hpc.runtime.slurm import ask
from piper_hpc.submit.evidence import printed
from piper_hpc.submit.process import alive
from piper_hpc.submit.scheduler import (
    CANCELLED,
    ENDED,
    FAILURES,
    GONE,
    PENDING,
    RUNNING,
    JobState,
    job_states,
    kill_wait_s,
)

LAST_WORD_S = 1.0
"""How long the record of a job that is gone may take to reach whoever asks."""
RECORD_GRACE_S = 120.0
"""How long after its job's end in Slurm a record may come: shared file systems show a write up to a minute late."""
LOCAL_CANCEL_S = 10.0
CANCEL_MARGIN_S = 30.0
"""How long a cancelled job may take beyond Slurm's own wait: for its epilog, and for squeue to tell."""
EVIDENCE_LINES = 12
LONG_AFTER_S = 6.0
_NAMED = re.compile(r"rank (\d+) is the first that did not enter it|does not answer: rank 0, or its node")
SILENT = "ended without a word"
AWAITED = "ended in Slurm; its record is awaited"


def failure_status(
    run: RunFolder, status: Status, codes: dict[int, int] | None = None, evidence: Sequence[str] = ()
) -> Status:
    """The `failed` status, with class, reason and evidence, of a run whose processes all ended without writing one
    themselves.

    `codes` are exit codes by rank, where a parent saw them (negative: the signal that killed the rank); evidence: what
    the parent saw beside them.
    """
    # An attempt may end before it says that it runs: its logs tell of it, the status does not.
    attempt = max(status.attempt, run.newest_attempt())
    failures, said = run.failures(attempt), printed(run, attempt)
    killed = sorted(rank for rank, code in (codes or {}).items() if code < 0)
    own = [failure for failure in failures if failure.failure_class not in ECHOES]
    silent = run.silent_ranks(attempt)
    seen = [*evidence, *said.oom, *(line for failure in failures for line in failure.evidence)]
    there = _nodes_of(run, attempt, [*killed, *silent])
    near = [line for failure in failures if not there or failure.node in there for line in failure.evidence]
    no_memory = [*said.oom, *(line for line in (*evidence, *near) if memory_kills.WORDS in line)]
    by_signal = "oom" if no_memory else "killed"
    if own and not killed:
        first = own[0]
        failure_class, reason = first.failure_class, f"rank {first.rank}: {first.reason}"
        seen = [*first.evidence]
    elif killed and codes is not None:
        name = signal.Signals(-codes[killed[0]]).name
        failure_class = by_signal if name == "SIGKILL" else "killed"
        reason = f"rank {', '.join(map(str, killed))} was killed by {name}"
    elif said.failed_nodes or any("NODE FAILURE" in cause for cause in said.causes):
        failure_class = "node_fail"
        reason = f"node {', '.join(said.failed_nodes) or '(see the evidence)'} failed"
        seen += said.causes
    elif said.first_killed is not None:
        node, ranks, how = said.first_killed
        failure_class, reason = by_signal, f"rank {ranks} on {node}: {how.lower()}"
        seen.append(f"srun: error: {node}: task {ranks}: {how}")
    elif failures and failures[0].failure_class == "hang":
        failure_class, reason = "hang", _who_hangs(failures, silent)
    elif failures:
        # Only lost peers spoke: who was lost ended without a word.
        who = ", ".join(map(str, silent)) or "unknown"
        failure_class = by_signal
        reason = f"{SILENT}: rank {who}; first to miss it was rank {failures[0].rank}: {failures[0].reason}"
    else:
        failure_class, reason = "lost", f"the job ended without a word; see {run.logs}"
        seen += said.causes
    kept = tuple(dict.fromkeys(seen))[:EVIDENCE_LINES]
    return Status("failed", attempt, failure_class, reason, status.step, evidence=kept)


def _nodes_of(run: RunFolder, attempt: int, ranks: Sequence[int]) -> set[str]:
    """Where these ranks ran, as far as the attempt came to say so: what other nodes counted says nothing of them."""
    try:
        job = run.manifest().get("job") or {}
        nodes = job.get("node_of_rank") or []
        return {nodes[rank] for rank in ranks if rank < len(nodes)} if job.get("attempt") == attempt else set()
    except (RecordError, AttributeError, TypeError):  # damaged: how the run ended is known nevertheless
        return set()


def _who_hangs(failures: Sequence[Failure], silent: Sequence[int]) -> str:
    """Who did not come, and to what, by the ranks that waited."""
    first, late = failures[0], silent or _late(failures)
    who = f"rank {', '.join(map(str, late))}" if late else "a rank that no other names"
    where = first.evidence[0].partition(" was at ")[2] if first.evidence else "a collective"
    return f"{who} did not come to the {where}; rank {first.rank} waited in vain: {first.reason}"


def _late(failures: Sequence[Failure]) -> list[int]:
    """Of ranks that all spoke, as srun wakes what is stopped before it ends it: whom the first names, see
    piper_hpc.comm.channel; or those that were least far; or else those that entered a collective after the first had
    given up, that waited for nobody, or that spoke long after it."""
    gave_up_s, told = failures[0].time_s, _NAMED.search(failures[0].reason)
    if told is not None:
        return [int(told[1] or 0)]  # the store is rank 0's
    furthest = max(failure.step or 0 for failure in failures)
    behind = [failure.rank for failure in failures if failure.step is not None and failure.step < furthest]
    after = [failure.rank for failure in failures if failure.entered_s is not None and failure.entered_s > gave_up_s]
    patient = [failure.rank for failure in failures if failure.failure_class != "hang"]
    at_last = [failure.rank for failure in failures if failure.time_s > gave_up_s + LONG_AFTER_S]
    few = (each for each in (patient, at_last) if 0 < 2 * len(each) <= len(failures))
    return behind or after or next(few, [])


def observe(run: RunFolder, known: Mapping[str, JobState] | None = None) -> Status:
    """The status as the scheduler sees it now; a run that ended unseen is recorded as what it became.

    A job that Slurm says completed, and that left no word of it, is no failure before RECORD_GRACE_S have passed: it is
    `running` with the reason AWAITED, and nothing is written. known: what Slurm was found to say of
    jobs just now, where it was asked for many at once.
    """
    status, job = run.status(), run.job()
    if status.ended:
        return _heard_since(run, status)
    if not job:
        return status
    if job["scheduler"] == "slurm":
        states = job_states([job["id"]], job["environment"]) if known is None else known
        return _in_slurm(run, status, states.get(job["id"]))
    if job.get("host", platform.node()) != platform.node():
        return status  # its processes are not seen from here
    if alive(int(job["id"]), run.run_id):
        return status
    with contextlib.suppress(OSError):  # the supervisor died before it could; a rank may still be on its way out
        quota.remove_tree(run.run_id)
    latest = _last_word(run)
    return latest if latest.ended else _recorded(run, failure_status(run, latest))


def _in_slurm(run: RunFolder, status: Status, said: JobState | None) -> Status:
    if said is None:
        return status
    if said.word in PENDING:
        return Status("pending", status.attempt, None, said.reason or None, status.step)
    if said.word in RUNNING:
        return status if status.state == "running" else Status("running", status.attempt, step=status.step)
    if said.word not in (*CANCELLED, *FAILURES, *ENDED, GONE):
        return status  # a word that no list has ends nothing
    spoke = bool(run.failures(max(status.attempt, run.newest_attempt())))
    if said.word in ("COMPLETED", GONE) and not spoke and time.time() - _ended_s(run, said) < RECORD_GRACE_S:
        return Status("running", status.attempt, None, AWAITED, status.step)
    status = _last_word(run)
    if status.ended:
        return status
    if said.word in CANCELLED:
        return _recorded(run, Status("cancelled", status.attempt, None, "cancelled in Slurm", status.step))
    if said.word in FAILURES:
        reason = f"Slurm says {said.word}"
        return _recorded(run, Status("failed", status.attempt, FAILURES[said.word], reason, status.step))
    return _recorded(run, failure_status(run, status))


def _heard_since(run: RunFolder, status: Status) -> Status:
    """How a run ended that was found silent: what its ranks left of it may have come since."""
    was_silent = status.failure_class == "lost" or (status.reason or "").startswith(SILENT)
    if status.state != "failed" or not was_silent or run.said_its_end():
        return status
    try:
        found = failure_status(run, status)
    except RecordError:  # what came is torn: how the run ended is known nevertheless
        return status
    return status if found.failure_class in ("lost", status.failure_class) else _recorded(run, found)


def _ended_s(run: RunFolder, said: JobState) -> float:
    """When a job ended, Unix: as Slurm says, else no earlier than the last sign of life in its record."""
    return said.end_s if said.end_s is not None else run.last_written_s()


def _last_word(run: RunFolder) -> Status:
    """The record's status, an ended one if it comes in LAST_WORD_S: through a file system it may be on its way."""
    deadline = time.monotonic() + LAST_WORD_S
    while not (status := run.status()).ended and time.monotonic() < deadline:
        time.sleep(0.1)
    return status


def _recorded(run: RunFolder, seen: Status) -> Status:
    """Record what was seen from outside, and return what then counts: the run's own last word, had it come by now."""
    with contextlib.suppress(OSError):  # a colleague's run can be read, and not written
        run.write_observed(seen)
    latest = run.status()
    return latest if latest.ended else seen


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


def cancel(run: RunFolder, tell: Callable[[float], None] = lambda wait_s: None) -> Status:
    """End a run that is pending or running, and wait until it has: in Slurm up to its KillWait and CANCEL_MARGIN_S.

    tell: called with the longest wait in seconds once the cancellation was accepted, if the run has not ended by then.
    Returns a status that has not ended where the wait was not enough: Slurm ends the job nevertheless.
    """
    status, job = observe(run), run.job()
    if status.ended or not job or status.reason == AWAITED:
        return status
    in_slurm = job["scheduler"] == "slurm"
    if in_slurm:
        step = f".{job['step']}" if "step" in job else ""  # of a pool, whose job goes on with other points
        answer = ask(["scancel", f"{job['id']}{step}"], job["environment"])
        if not answer.ok:
            status = observe(run)
            if status.ended or status.reason == AWAITED:
                return status  # it came to its end by itself just now
            rule = f"scancel failed: {answer.reason}"
            raise ConfigError(Problem("job", job["id"], rule, "the same command on a login node of its cluster"))
        if step:
            return _recorded(run, Status("cancelled", status.attempt, None, "cancelled", status.step))
    elif job.get("host", platform.node()) != platform.node():
        raise ConfigError(Problem("RUN", run.run_id, f"runs on {job['host']}", f"the same command on {job['host']}"))
    else:
        with contextlib.suppress(ProcessLookupError):  # it ended just now
            os.kill(int(job["id"]), signal.SIGINT)
    longest_s = LOCAL_CANCEL_S if not in_slurm else kill_wait_s(job["environment"]) + CANCEL_MARGIN_S
    deadline, pause_s, told = time.monotonic() + longest_s, 0.1, False
    while not (status := observe(run)).ended and time.monotonic() < deadline:
        if in_slurm and not told:
            tell(longest_s)
            told = True
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, 2.0) if in_slurm else pause_s  # each look is a question to the controller
    return status
