"""Shared memory that MPICH's jobs leave behind. Its segments are named by job, and each testbed counts its jobs from 1,
so that the next testbed's jobs would meet them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")


def unused() -> list[Path]:
    """Segments of MPICH that no process has mapped."""
    segments = sorted(FOLDER.glob("mpich_shm_*"))
    used: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps") if segments else ():
        with suppress(OSError):  # ended in between
            used |= {line.split()[-1] for line in maps.read_text().splitlines() if str(FOLDER) in line}
    return [segment for segment in segments if str(segment) not in used]


def remove() -> None:
    """Remove what is unused; to be called when no job runs."""
    for segment in unused():
        segment.unlink(missing_ok=True)
