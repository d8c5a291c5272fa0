"""States of a run and classes of failures: the vocabulary that every part of the project uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STATES = ("pending", "running", "completed", "failed", "cancelled")

FAILURE_CLASSES = {
    "oom": "a device or a node ran out of memory, or a rank was killed by its memory limit",
    "timeout": "the time limit was reached",
    "preempted": "the scheduler took the nodes back",
    "node_fail": "a node failed",
    "comm": "a peer was lost or did not answer within the group's time-out",
    "hang": "a rank did not come to a collective within the group's time-out, or no step was taken for far too long",
    "rendezvous": "the ranks did not find one another",
    "config": "the job's configuration is wrong",
    "data": "the data to learn cannot be read, or is not what it was",
    "numerical": "a loss or a gradient is infinite or not a number",
    "disk_full": "a file system has no room or no files left",
    "killed": "a process of the job was killed",
    "launcher_lost": "the launcher that waited for the run was killed",
    "lost": "the job ended without a word",
    "error": "an exception in the job's code",
}

RESUME = "python -m piper_hpc.jobs resume RUN"
ADVICE = {
    "oom": "a smaller parallelism.micro_batch, parallelism.recompute=full or more nodes: "
    f"{RESUME} parallelism.recompute=full; parallelism=auto plans a layout that fits",
    "timeout": f"{RESUME}, which goes on from the newest checkpoint; cluster.time_min=... where the site allows more",
    "preempted": f"{RESUME}, where Slurm has not requeued it by itself",
    "node_fail": f"{RESUME} cluster.exclude=NODE, with the node that failed",
    "comm": f"look at the first rank that missed a peer (jobs logs RUN --rank N), then {RESUME}",
    "hang": "look where the named rank stands (its stack is in its log, collectives in rank-N.flight.json), then "
    f"{RESUME}; cluster.comm_timeout_s=... where it was slow and not stuck",
    "rendezvous": "see that the batch script's MASTER_ADDR is the first node's address on the network that "
    f"GLOO_SOCKET_IFNAME names; python -m piper_hpc.doctor cluster=NAME on=nodes says which; then {RESUME}",
    "config": f"{RESUME} KEY=VALUE, as the reason says",
    "data": f"see that the files of data are there and as they were, then {RESUME}",
    "numerical": f"{RESUME} train.learning_rate=... or train.on_non_finite=skip",
    "disk_full": f"make room, or {RESUME} train.checkpoint_keep=1; the newest whole checkpoint is as it was",
    "killed": f"see who killed it (jobs logs RUN --rank batch), then {RESUME}",
    "launcher_lost": f"{RESUME} wait=false, which outlives its launcher",
    "lost": f"see what the job printed (jobs logs RUN --rank batch), then {RESUME}",
    "error": "read the traceback (jobs logs RUN --rank N)",
}
"""Class -> what to do, with RUN for the run's id."""
ECHOES = ("comm", "hang")
"""Classes of a rank that tells what it saw of others."""


@dataclass(frozen=True)
class Status:
    """State of a run; `failure_class` (a key of FAILURE_CLASSES) and `reason` are set when it failed; evidence: what
    the class rests on, line by line."""

    state: str
    attempt: int = 0
    failure_class: str | None = None
    reason: str | None = None
    step: int | None = None
    updated: str = ""
    evidence: tuple[str, ...] = ()

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
        known = {key: document[key] for key in Status.__dataclass_fields__ if key in document}
        return Status(**known | {"evidence": tuple(document.get("evidence") or ())})


@dataclass(frozen=True)
class Failure:
    """Why one rank failed. `time_s` (Unix) tells the first failure, the cause, from those that follow it.

    evidence: what the rank saw beside the exception, of its node too; step: the one it was in; entered_s: when it
    entered its last collective (Unix).
    """

    rank: int
    failure_class: str
    reason: str
    traceback: str
    time_s: float
    node: str = ""
    evidence: tuple[str, ...] = ()
    step: int | None = None
    entered_s: float | None = None
