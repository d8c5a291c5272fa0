"""What Slurm says of jobs: their state in its words, why they wait, and when they start and end."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from piper_hpc.runtime.slurm import ask

TIMES = {"SLURM_TIME_FORMAT": "standard"}
"""Users set others, such as `relative`."""
PENDING = frozenset(
    (
        *("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"),
        *("POWER_UP_NODE",),
    )
)
RUNNING = frozenset(
    (
        *("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "LAUNCH_FAILED"),
        *("RECONFIG_FAIL", "UPDATE_DB", "EXPEDITING"),
    )
)
"""Words of jobs that wait, and that may still run; any other that no list has is of neither, and ends nothing."""
CANCELLED = frozenset(("CANCELLED", "REVOKED"))
FAILURES = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "OUT_OF_MEMORY": "oom",
}
"""Word -> class of the failure."""
ENDED = frozenset(("COMPLETED", "FAILED"))
"""Words of jobs that ended by themselves: what became of them is in the record."""
GONE = "GONE"
"""Our own word for a job of which a controller that answers knows nothing, and accounting, if there is any, neither."""
KILL_WAIT_S = 30.0
"""Slurm's default of what lies between its SIGTERM and its SIGKILL."""
_UNKNOWN_ID = "invalid job id"
_NO_TIME = ("", "N/A", "Unknown", "None")


@dataclass(frozen=True)
class JobState:
    """Slurm's word; for a job that waits its reason; and what Slurm says of its times.

    start_s, end_s: Unix, of the start and the end, of a job that waits or runs the expected ones; left_s: of the time
    limit. None where Slurm does not say.
    """

    word: str
    reason: str = ""
    start_s: float | None = None
    end_s: float | None = None
    left_s: float | None = None


def job_states(ids: Sequence[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    """The state of each job that Slurm knows, or surely does not know any more; others are left out.

    One squeue for all, one sacct for all that the controller has forgotten, and scontrol where both say nothing.
    """
    found = _squeue(ids, environment)
    missing = [job_id for job_id in ids if job_id not in found]
    if missing:
        found |= _sacct(missing, environment)
    for job_id in missing:
        if job_id not in found and (state := _scontrol(job_id, environment)):
            found[job_id] = state
    return found


@dataclass(frozen=True)
class QueuePlace:
    """Where a job stands among those that wait for its partition: its place, from 1, of how many."""

    place: int
    of: int


def queue_place(job_id: str, environment: Mapping[str, str]) -> QueuePlace | None:
    """The place by priority; None where Slurm does not say. A site may show a user no jobs but their own."""
    words = ["squeue", "--noheader", "--states=PENDING", "--sort=-p,i", "--format", "%i|%P"]
    answer = ask(words, environment)
    lines = [line.strip().split("|", 1) for line in answer.text.splitlines() if "|" in line] if answer.ok else []
    partition = {job: name for job, name in lines}.get(job_id)
    waiting = [job for job, name in lines if name == partition]
    return QueuePlace(waiting.index(job_id) + 1, len(waiting)) if partition is not None else None


@dataclass(frozen=True)
class JobFacts:
    """What the controller says of a job that it still has: state and reason in its words, when it ends (Unix), whether
    it is being preempted, its nodes as Slurm writes them, how often it was requeued, and the file of its output."""

    state: str
    reason: str
    end_s: float | None
    preempted: bool
    nodes: str
    restarts: int = 0
    output: str = ""


def job_facts(job_id: str, environment: Mapping[str, str]) -> JobFacts | None:
    """Of one job, for who is part of it; None where Slurm does not say."""
    answer = ask(["scontrol", "--oneliner", "show", "job", job_id], {**environment, **TIMES})
    if not answer.ok or not answer.text.strip():
        return None
    said = dict(word.split("=", 1) for word in answer.text.splitlines()[0].split() if "=" in word)
    return JobFacts(
        state=_first_word(said.get("JobState") or "UNKNOWN"),
        reason=said.get("Reason", ""),
        end_s=unix_time(said.get("EndTime", "")),
        preempted=said.get("PreemptTime", "None") not in _NO_TIME,
        nodes=said.get("NodeList", ""),
        restarts=int(said.get("Restarts") or 0),
        output=said.get("StdOut", ""),
    )


def nodes_down(nodes: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Of these nodes, as Slurm writes them, those that it holds for failed, with its word for that."""
    answer = ask(["sinfo", "--noheader", "--Node", "--nodes", nodes, "--format", "%N %T"], environment)
    found = [line.split() for line in answer.text.splitlines()] if answer.ok and nodes else []
    return {
        pair[0]: pair[1]
        for pair in found
        if len(pair) == 2 and (pair[1].endswith("*") or pair[1].startswith(("down", "fail", "error")))
    }


def kill_wait_s(environment: Mapping[str, str]) -> float:
    """The seconds that Slurm gives a cancelled job between SIGTERM and SIGKILL."""
    answer = ask(["scontrol", "show", "config"], environment)
    said = re.search(r"^KillWait\s*=\s*(\d+)", answer.text, re.MULTILINE) if answer.ok else None
    return float(said[1]) if said else KILL_WAIT_S


def _squeue(ids: Sequence[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    words = ["squeue", "--noheader", "--states=all", "--jobs", ",".join(ids), "--format", "%i|%T|%S|%e|%L|%r"]
    found = {}
    # An id that is long gone makes squeue fail where it is asked for alone.
    answer = ask(words, {**environment, **TIMES})
    for line in answer.text.splitlines() if answer.ok else ():
        job_id, word, start, end, left, reason = [part.strip() for part in [*line.split("|", 5), *[""] * 5][:6]]
        if word:
            reason = "" if reason == "None" else reason
            found[job_id] = JobState(word, reason, unix_time(start), unix_time(end), duration_s(left))
    return found


def _sacct(ids: Sequence[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    # Tasks of arrays go by their own name, which is no raw id.
    tasks = [job_id for job_id in ids if "_" in job_id]
    jobs = [job_id for job_id in ids if "_" not in job_id]
    asked = [(jobs, "JobIDRaw"), (tasks, "JobID")]
    return {job: state for some, field in asked if some for job, state in _accounted(some, field, environment).items()}


def _accounted(ids: Sequence[str], field: str, environment: Mapping[str, str]) -> dict[str, JobState]:
    words = ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", ",".join(ids)]
    answer = ask([*words, "--format", f"{field},State,Start,End"], {**environment, **TIMES})
    found = {}
    for line in answer.text.splitlines() if answer.ok else ():
        job_id, word, start, end = [part.strip() for part in [*line.split("|", 3), *[""] * 3][:4]]
        if word and job_id in ids:
            found[job_id] = JobState(_first_word(word), "", unix_time(start), unix_time(end))
    return found


def _scontrol(job_id: str, environment: Mapping[str, str]) -> JobState | None:
    answer = ask(["scontrol", "--oneliner", "show", "job", job_id], {**environment, **TIMES})
    if not answer.ok:
        return JobState(GONE) if _UNKNOWN_ID in answer.reason.lower() else None
    said = dict(word.split("=", 1) for word in answer.text.split() if "=" in word)
    if not said.get("JobState"):
        return None
    times = unix_time(said.get("StartTime", "")), unix_time(said.get("EndTime", ""))
    return JobState(_first_word(said["JobState"]), "", *times)


def _first_word(word: str) -> str:
    return word.split()[0].rstrip("+")  # "CANCELLED by 0"


def unix_time(text: str) -> float | None:
    """Of a time as Slurm prints it, in the local zone; None for none."""
    try:
        return None if text in _NO_TIME else datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def duration_s(text: str) -> float | None:
    """Seconds of `[days-][[hours:]minutes:]seconds`; None for UNLIMITED, NOT_SET and the like."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts) or not (days or "0").isdecimal():
        return None
    seconds = 0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return float(86_400 * int(days or 0) + seconds)
