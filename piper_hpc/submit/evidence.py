"""What Slurm printed about an attempt: which task ended first and how, and which nodes failed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piper_hpc.runs import RunFolder

TAIL_BYTES = 256 * 1024
_TASK = re.compile(r"srun: error: (\S+): tasks? ([\d,\-\[\]]+): (.+)")
_CAUSE = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON (\S+) CANCELLED AT \S+ DUE TO (.+?) \*\*\*")
_OOM = re.compile(r"oom.kill|out of memory", re.IGNORECASE)
_KILLED = re.compile(r"killed|bus error|segmentation fault|aborted|illegal instruction", re.IGNORECASE)


@dataclass(frozen=True)
class Printed:
    """first_killed: node, ranks and how of the task that srun saw end first, where a signal ended it; oom: lines of
    memory limits; failed_nodes; causes: why Slurm ended the job, in its words."""

    first_killed: tuple[str, str, str] | None = None
    oom: tuple[str, ...] = ()
    failed_nodes: tuple[str, ...] = ()
    causes: tuple[str, ...] = ()


def taken_by(causes: Sequence[str]) -> tuple[str | None, str] | None:
    """Class and words of why Slurm took an attempt away to start it again; None where nothing says that it did."""
    for word, failure_class in (("PREEMPT", "preempted"), ("NODE FAIL", "node_fail"), ("REQUEUE", None)):
        for cause in causes:
            if word in cause:
                return failure_class, f"ended by Slurm due to {cause.split(',')[0].lower()}"
    return None


def printed(run: RunFolder, attempt: int) -> Printed:
    """Of the attempt's part of its job's output; nothing of a run on this machine."""
    about = run.attempt(attempt)
    found = run.logs / f"slurm-{about.get('job_id')}.out"
    return read_file(found, about.get("printed_bytes", 0)) if found.is_file() else Printed()


def read_file(path: Path, begin: int = 0) -> Printed:
    """What a job printed into a file, from a byte on."""
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - TAIL_BYTES))
        return read(file.read().decode(errors="replace"))


def read(text: str) -> Printed:
    """What a job printed."""
    tasks = _TASK.findall(text)
    first = next(iter(tasks), None)
    return Printed(
        first_killed=first if first is not None and (_KILLED.search(first[2]) or _OOM.search(first[2])) else None,
        oom=tuple(line.strip() for line in text.splitlines() if _OOM.search(line)),
        failed_nodes=tuple(dict.fromkeys(re.findall(r"Node failure on (\S+)", text))),
        causes=tuple(cause for _, cause in _CAUSE.findall(text)),
    )
