"""Processes that end with the one they serve (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent ends, however that ends. No-op outside Linux."""
    parent = os.getppid()
    try:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended while we asked
        os.kill(os.getpid(), signal_number)


def alive(pid: int, word: str = "") -> bool:
    """True if a process of this id runs, is no zombie, and has `word` in its command line: ids are used again."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            running = file.read().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
        with open(f"/proc/{pid}/cmdline") as file:
            return running and word in file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
