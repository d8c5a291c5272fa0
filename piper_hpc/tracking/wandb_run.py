"""The record as a wandb run, offline in the run's folder or live. Imported only when asked for: wandb is optional."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from piper_hpc.tracking.rows import flatten

try:
    import wandb
except ImportError as error:
    raise ImportError(
        "tracking=wandb and tracking=wandb_offline need the package wandb, which is not installed; "
        "install it with: pip install wandb, or use tracking=none"
    ) from error


class WandbTracker:
    """A wandb run named as the run's folder; offline, its files are under `wandb/` there, for `wandb sync`."""

    def __init__(self, mode: Literal["online", "offline"], *, project: str, entity: str | None) -> None:
        self._mode, self._project, self._entity = mode, project, entity
        self._run: Any = None

    def start(self, config: dict[str, Any], run_dir: Path) -> None:
        """Begin; a later attempt of the same run goes on with the same wandb run."""
        self._run = wandb.init(
            mode=self._mode,
            project=self._project,
            entity=self._entity,
            id=run_dir.name,
            name=run_dir.name,
            resume="allow" if self._mode == "online" else None,
            dir=str(run_dir),
            config=config,
            # What the process prints is in the run's own logs; the machine's load is no part of the record.
            settings=wandb.Settings(console="off", silent=True, save_code=False, x_disable_stats=True),
        )

    def log(self, row: dict[str, Any]) -> None:
        """One row as one wandb step."""
        self._run.log(flatten(row), step=row["step"])

    def finish(self, status: str) -> None:
        """End with exit code 0 for `completed`, else 1; waits until everything is written."""
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "completed" else 1)
