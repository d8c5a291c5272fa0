"""Whose turn it is among tests that pytest-xdist runs beside each other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

RANKS, MACHINE = ROOMS = ("ranks", "machine")


def rooms(item: pytest.Item) -> dict[str, bool]:
    """The rooms that a test enters, and whether alone: by its markers, which tests/conftest.py explains."""
    names = ("alone", "slurm", "untimed", "processes")
    alone, slurm, untimed, processes = (item.get_closest_marker(name) is not None for name in names)
    if alone or slurm or processes:
        return {RANKS: alone or (slurm and not untimed), MACHINE: alone}
    return {MACHINE: False}


class Turns:
    """Locks on files of a folder that all workers of a session share; the kernel drops those of a worker that dies.

    In a room are many at once, or one alone. Who wants in passes the room's door one by one, and whoever wants to be
    alone keeps it shut until the others have left, so that nobody waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        names = [name for room in ROOMS for name in (room, f"{room}.door")]
        self._files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o600) for name in names}
        self._inside: Mapping[str, bool] = {}

    def enter(self, wanted: Mapping[str, bool]) -> None:
        """Wait until these rooms may be entered, each alone or not; those of the test before are left or kept.

        All take them in the order of `ROOMS`, so that no two wait for each other.
        """
        if wanted == self._inside:
            return
        self.leave()
        for room in (room for room in ROOMS if room in wanted):
            fcntl.flock(self._files[f"{room}.door"], fcntl.LOCK_EX)
            fcntl.flock(self._files[room], fcntl.LOCK_EX if wanted[room] else fcntl.LOCK_SH)
            fcntl.flock(self._files[f"{room}.door"], fcntl.LOCK_UN)
        self._inside = wanted

    def leave(self) -> None:
        """Leave every room."""
        for room in reversed(ROOMS):
            fcntl.flock(self._files[room], fcntl.LOCK_UN)
        self._inside = {}
