"""A view that cannot end or hold up what it shows: its errors are told once, and the training goes on without it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from piper_hpc.tracking.base import NoTracker, Tracker

LIMIT_S = 60.0
"""The longest that a tracker's start and its end may each take."""


class GuardedTracker:
    """The tracker that `make` returns, until it fails or does not start in time; nothing is shown from then on.

    make: is called by `start`, so that what cannot be imported on this node is an error of the view too.
    limit_s: of the start, and of the end, in seconds.
    """

    def __init__(self, make: Callable[[], Tracker], limit_s: float = LIMIT_S) -> None:
        self._make, self._limit_s = make, limit_s
        self._tracker: Tracker = NoTracker()
        self._run_id = ""

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        """Begin, if that works within the limit."""
        self._run_id = run_dir.name
        made: list[Tracker] = []

        def begin() -> None:
            tracker = self._make()
            tracker.start(config, run_dir)
            made.append(tracker)

        if self._attempt("did not start", lambda: _within(self._limit_s, begin)):
            (self._tracker,) = made

    def log(self, row: dict[str, Any]) -> None:
        """Show a row, if the view is still there."""
        self._attempt(f"failed at step {row.get('step')}", lambda: self._tracker.log(row))

    def finish(self, status: str) -> None:
        """End, or leave what is not sent by the limit."""
        self._attempt("did not end well", lambda: _within(self._limit_s, lambda: self._tracker.finish(status)))

    def _attempt(self, what: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            again = f"python -m piper_hpc.jobs sync {self._run_id}"
            told = f"the tracker {what} ({reason}); the run goes on without, and its record can be shown later: {again}"
            print(told, file=sys.stderr, flush=True)
            self._tracker = NoTracker()
            return False
        return True


def _within(limit_s: float, call: Callable[[], None]) -> None:
    """Call on another thread and wait. Raises what it raises, TimeoutError where it takes longer than `limit_s`."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # also a library that exits: it is on a thread of its own
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {limit_s:.0f} s")
    if errors:
        error = errors[0]
        raise error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
