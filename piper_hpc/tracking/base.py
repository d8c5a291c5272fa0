"""The interface of an experiment tracker, and the factory that makes one by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

TRACKERS = ("none", "wandb_offline", "wandb")


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


def make(name: str, *, project: str = "piper_hpc", entity: str | None = None) -> Tracker:
    """The tracker of a name in TRACKERS; `project` and `entity` say where wandb puts the run.

    Nothing is imported for `none`. Raises ValueError for an unknown name and ImportError, with the command that
    installs it, where wandb is missing.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracking={name!r}: must be one of {', '.join(TRACKERS)}; use tracking=none")
    if name == "none":
        return NoTracker()
    from piper_hpc.tracking.wandb_run import WandbTracker

    return WandbTracker("offline" if name == "wandb_offline" else "online", project=project, entity=entity)
