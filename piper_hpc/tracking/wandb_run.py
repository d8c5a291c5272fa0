"""The record as a wandb run, offline in the run's folder or live. Imported only when asked for: wandb is optional."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from piper_hpc.runs import RunFolder
from piper_hpc.tracking.guard import LIMIT_S
from piper_hpc.tracking.rows import flatten, with_prediction

try:
    import wandb
except ImportError as error:
    raise ImportError(
        "tracking=wandb, tracking=wandb_offline and jobs sync need the package wandb, which is not installed; "
        "install it with: pip install wandb, or use tracking=none"
    ) from error


ARRIVAL_LIMIT_S = 20.0
"""How long wandb may take to show what it has been sent, in seconds."""


class WandbTracker:
    """A wandb run named as the run's folder; offline, its files are under `wandb/` there, for `wandb sync`.

    finish_limit_s: how long the end may wait for what is not sent yet, in seconds.
    """

    def __init__(
        self,
        mode: Literal["online", "offline"],
        *,
        project: str,
        entity: str | None,
        finish_limit_s: float = LIMIT_S,
    ) -> None:
        self._mode, self._project, self._entity = mode, project, entity
        self._finish_limit_s = finish_limit_s
        self._prediction: dict[str, Any] | None = None
        self._run: Any = None

    def start(self, config: dict[str, Any], run_dir: Path, files: Path | None = None) -> None:
        """Begin; a later attempt of the same run goes on with the same wandb run, and a sweep's runs are one group.

        files: where wandb keeps its own, `run_dir` if not given.
        """
        record = RunFolder(run_dir)
        sweep = record.manifest().get("sweep") or {}
        self._prediction = record.prediction()
        self._run = wandb.init(
            mode=self._mode,
            project=self._project,
            entity=self._entity,
            id=run_dir.name,
            name=run_dir.name,
            group=sweep.get("name"),
            job_type=(config.get("task") or {}).get("name"),
            resume="allow" if self._mode == "online" else None,
            dir=str(files or run_dir),
            config=config | ({"axes": sweep["axes"]} if sweep else {}),
            # What the process prints is in the run's own logs; the machine's load, its environment and the state of the
            # code are no part of what is shown, and nothing of them leaves with it.
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_git=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                init_timeout=LIMIT_S,
                login_timeout=LIMIT_S,
                finish_timeout=self._finish_limit_s,
                finish_timeout_raises=True,
            ),
        )

    @property
    def next_step(self) -> int:
        """The first step that wandb does not have; offline 0, as wandb was not asked."""
        return int(self._run.starting_step)

    @property
    def files(self) -> Path:
        """Where wandb keeps what is, or will be, sent."""
        return Path(self._run.dir).parent

    @property
    def url(self) -> str | None:
        """The page of the run; None offline."""
        return self._run.url if self._mode == "online" else None

    def log(self, row: dict[str, Any]) -> None:
        """One row as one wandb step, and beside it what was predicted."""
        self._run.log(flatten(with_prediction(row, self._prediction)), step=row["step"])

    def summarise(self, values: Mapping[str, float | int | str]) -> None:
        """Values of the whole run."""
        self._run.summary.update(dict(values))

    def attach(self, name: str, files: Sequence[Path]) -> None:
        """Files as one artifact; wandb makes a new version where their bytes are others than the last version's."""
        artifact = wandb.Artifact(name, type="record")
        for file in files:
            artifact.add_file(str(file), policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact)

    def finish(self, status: str) -> None:
        """End with exit code 1 for `failed` and `cancelled`, else 0; waits until everything is written.

        Raises TimeoutError where that takes longer than the limit.
        """
        self._run.summary["status"] = status
        self._run.finish(exit_code=1 if status in ("failed", "cancelled") else 0)

    def last_step(self, wanted: int) -> int:
        """The last step that wandb has, asked again until it is `wanted` or the limit has passed; -1 for none."""
        deadline = time.monotonic() + ARRIVAL_LIMIT_S
        while True:
            found = int(wandb.Api(timeout=round(LIMIT_S)).run(self._run.path).lastHistoryStep)
            if found >= wanted or time.monotonic() > deadline:
                return found
            time.sleep(1.0)
