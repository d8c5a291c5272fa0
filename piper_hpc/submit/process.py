"""Process lifetimes on Linux: die with the parent, and recognise a process by id and command line."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from typing import Any

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent(signal_number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to signal this process when its parent ends, however that ends. No-op outside Linux.

    parent: the process that must be the parent still; told by it, so that one that ended before this call is noticed.
    """
    parent = parent if parent is not None else os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def name_process(name: str) -> None:
    """What `ps -e` and top call this process: up to 15 characters. No-op outside Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def local_job(pid: int) -> dict[str, Any]:
    """`job.json` of a run that process `pid` of this machine supervises."""
    return {"scheduler": "local", "id": str(pid), "host": platform.node(), "environment": {}}


def alive(pid: int, word: str = "") -> bool:
    """True if a process of this id runs, is no zombie, and has `word` in its command line: ids are used again.

    One without a command line counts: the kernel has started it, and is still loading its program.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            running = file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
        with open(f"/proc/{pid}/cmdline") as file:
            command = file.read()
            return running and (word in command or not command)
    except (FileNotFoundError, ProcessLookupError):
        return False
