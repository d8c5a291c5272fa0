"""What an exception means: its root cause, and one of the failure classes of piper_hpc.runs."""

from __future__ import annotations

import errno

import torch
import torch.distributed as dist

from piper_hpc.runtime.group import RendezvousError
from piper_hpc.spec.problem import SpecError

_LATE_PEER = ("timed out waiting", "socket timeout", "watchdog caught collective operation timeout")
_LOST_PEER = ("connection closed by peer", "connection reset", "broken pipe")
_NO_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory")
_NO_ROOM = ("no space left on device", "disk quota exceeded")


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain: a pipeline stage wraps what went wrong inside it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def classify(error: BaseException) -> str:
    """The failure class of an exception that ended a rank. Its `failure_class`, where it has one, is its own word."""
    root = root_cause(error)
    if isinstance(own := getattr(root, "failure_class", None), str):
        return own
    text = str(root).lower()
    if getattr(root, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(word in text for word in _NO_ROOM):
        return "disk_full"
    if isinstance(root, SpecError):
        of_data = all(problem.key.split(".")[0] == "data" for problem in root.problems)
        return "data" if of_data else "config"
    if isinstance(root, (MemoryError, torch.OutOfMemoryError)) or any(word in text for word in _NO_MEMORY):
        return "oom"
    if isinstance(error, RendezvousError):
        return "rendezvous"
    if any(word in text for word in _LATE_PEER):
        return "hang"
    if isinstance(root, dist.DistError) or any(word in text for word in _LOST_PEER):
        return "comm"
    return "error"


def one_line_reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    root = root_cause(error)
    lines = str(root).strip().splitlines()
    return f"{type(root).__name__}: {lines[0] if lines else ''}"
