"""States of a run and classes of failures: the vocabulary that every part of the project uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATES = ("pending", "running", "completed", "failed", "cancelled")

FAILURE_CLASSES = {
    "oom": "a device or a node ran out of memory",
    "timeout": "the time limit was reached",
    "preempted": "the scheduler took the nodes back",
    "node_fail": "a node failed",
    "comm": "a peer was lost or did not answer within the group's time-out",
    "rendezvous": "the ranks did not find one another",
    "config": "the job's configuration is wrong",
    "killed": "a process of the job was killed",
    "launcher_lost": "the launcher that waited for the run was killed",
    "lost": "the job ended without a word",
    "error": "an exception in the job",
}


@dataclass(frozen=True)
class Status:
    """State of a run; `failure_class` (a key of FAILURE_CLASSES) and `reason` are set when it failed."""

    state: str
    attempt: int = 0
    failure_class: str | None = None
    reason: str | None = None
    step: int | None = None
    updated: str = ""

    def __post_init__(self) -> None:
        if self.state not in STATES or (self.failure_class is not None and self.failure_class not in FAILURE_CLASSES):
            raise ValueError(f"no state or failure class of a run: {self.state}, {self.failure_class}")

    @property
    def ended(self) -> bool:
        """True when nothing of the run is alive any more."""
        return self.state in ("completed", "failed", "cancelled")

    @staticmethod
    def of(document: dict[str, Any]) -> Status:
        """From `status.json`. Raises ValueError or TypeError for what is no status."""
        if not isinstance(document.get("attempt", 0), int) or not isinstance(document.get("step"), int | None):
            raise ValueError("attempt and step must be whole numbers")
        return Status(**{key: document[key] for key in Status.__dataclass_fields__ if key in document})


@dataclass(frozen=True)
class Failure:
    """Why one rank failed. `time_s` (Unix) tells the first failure, the cause, from those that follow it."""

    rank: int
    failure_class: str
    reason: str
    traceback: str
    time_s: float
