"""What Slurm says of jobs: their state in its words, and why they wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piper_hpc.runtime.slurm import ask

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


@dataclass(frozen=True)
class JobState:
    """Slurm's word, and for a job that waits the reason."""

    word: str
    reason: str = ""


def job_states(ids: Sequence[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    """The state of each job that Slurm knows: one squeue for all, sacct and scontrol for what it has forgotten."""
    found = _squeue(ids, environment)
    for job_id in ids:
        if job_id not in found and (word := _forgotten(job_id, environment)):
            found[job_id] = JobState(word)
    return found


def _squeue(ids: Sequence[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    words = ["squeue", "--noheader", "--states=all", "--jobs", ",".join(ids), "--format", "%i|%T|%r"]
    found = {}
    # An id that is long gone makes squeue fail where it is asked for alone.
    answer = ask(words, environment)
    for line in answer.text.splitlines() if answer.ok else ():
        job_id, word, reason = [*line.split("|", 2), "", ""][:3]
        if word:
            found[job_id.strip()] = JobState(word.strip(), "" if reason.strip() == "None" else reason.strip())
    return found


def _forgotten(job_id: str, environment: Mapping[str, str]) -> str | None:
    for words in (
        ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job_id, "--format", "State"],
        ["scontrol", "--oneliner", "show", "job", job_id],
    ):
        answer = ask(words, environment)
        text = answer.text.strip() if answer.ok else ""
        if words[0] == "scontrol":
            text = next((word for word in text.split() if word.startswith("JobState=")), "").removeprefix("JobState=")
        if text:
            return text.split()[0].rstrip("+")  # "CANCELLED by 0"
    return None
