"""The interface of an experiment tracker, and one that shows nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """A view of one run: started once with its configuration, given every row of metrics, and told how it ended."""

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        """Begin the view of the run whose folder is `run_dir`; the folder's name is the run's id."""

    def log(self, row: dict[str, Any]) -> None:
        """Show one row of `metrics.jsonl`; rows come in the order of their `step`."""

    def finish(self, status: str) -> None:
        """End the view; `status` is a state of a run: `completed`, `failed` or `cancelled`."""


class NoTracker:
    """No view beside the record."""

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        """Nothing to begin."""

    def log(self, row: dict[str, Any]) -> None:
        """Nothing to show: the row is in `metrics.jsonl`."""

    def finish(self, status: str) -> None:
        """Nothing to end."""
