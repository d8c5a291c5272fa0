"""What an exception means: its root cause, and one of the failure classes of piper_hpc.runs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from piper_hpc.runtime.group import RendezvousError

_LOST_PEER = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "socket timeout")


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain: a pipeline stage wraps what went wrong inside it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def classify(error: BaseException) -> str:
    """The failure class of an exception that ended a rank."""
    root = root_cause(error)
    text = str(root).lower()
    if isinstance(root, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "oom"
    if isinstance(error, RendezvousError):
        return "rendezvous"
    if isinstance(root, dist.DistError) or any(word in text for word in _LOST_PEER):
        return "comm"
    return "error"


def one_line_reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    root = root_cause(error)
    lines = str(root).strip().splitlines()
    return f"{type(root).__name__}: {lines[0] if lines else ''}"
