"""What an exception means: one of the failure classes of piper_hpc.runs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from piper_hpc.runtime.group import RendezvousError

_LOST_PEER = ("connection closed by peer", "connection reset", "broken pipe", "timed out waiting", "socket timeout")


def classify(error: BaseException) -> str:
    """The failure class of an exception that ended a rank."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error).lower():
        return "oom"
    if isinstance(error, RendezvousError):
        return "rendezvous"
    text = str(error).lower()
    if isinstance(error, dist.DistError) or any(word in text for word in _LOST_PEER):
        return "comm"
    return "error"
