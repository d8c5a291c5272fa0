"""A rank's own folder for temporary files, so that users, runs and ranks of one node do not meet in /tmp."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "piper-"
SHORT = Path("/tmp")
"""Where the folder is made if the site's temporary folder has too long a path."""
LOCK = ".piper-rank.lock"
"""Held as long as a process of the rank lives, whatever ends it: the kernel lets go of it. It tells no process by its
number, which another container may use too."""
LONGEST_PATH = 107 - len("/pymp-12345678/listener-12345678")
"""Characters of a folder in which a Unix socket of Python's multiprocessing still has a path that the kernel takes."""


@contextmanager
def private_tmp(run_id: str, task: int) -> Iterator[Path]:
    """Make a folder of mode 0700 in the temporary folder, the one of this process and its children for the length of a
    `with`, and remove it at the end; what killed ranks of this user left on this node is removed at the beginning.

    Where the site's temporary folder is too deep for Unix sockets, it is made in SHORT.
    """
    remove_left()
    base, prefix = Path(tempfile.gettempdir()), f"{PREFIX}{run_id}-{task}-"
    if len(f"{base}/{prefix}12345678") > LONGEST_PATH and os.access(SHORT, os.W_OK):
        base = SHORT
    folder, lock = _locked(base, prefix)
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    try:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        yield folder
    finally:
        if before[0] is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = before[0]
        tempfile.tempdir = before[1]
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_left(run_id: str = "") -> list[Path]:
    """Remove the folders of this user's ranks, of one run or of all, whose processes are gone; returns them."""
    removed = []
    places = {Path(tempfile.gettempdir()), SHORT}
    for folder in [found for place in places for found in place.glob(f"{PREFIX}{run_id}*")]:
        with suppress(OSError):  # somebody else's, or removed in between
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with _held(folder):
                shutil.rmtree(folder)
            removed.append(folder)
    return removed


def _locked(base: Path, prefix: str) -> tuple[Path, int]:
    """A new folder and the descriptor of its lock, which is held.

    Before the lock is held, a rank that starts beside this one takes the folder for one that was left: then another.
    """
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        with suppress(OSError):  # a file system without locks: what a kill leaves stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The lock of a folder that nobody else holds. Raises OSError where somebody does, or where there is none: it is
    being made."""
    lock = os.open(folder / LOCK, os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
