"""A run's folder `runs/<run_id>/`: its files, their form, and how they are written so that a kill cannot tear them."""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from piper_hpc.runs.status import Failure, Status

SCHEMA_VERSION = 1


def utc_now() -> str:
    """The time now, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run_id() -> str:
    """An id that sorts by time and stays unique when two runs start in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class RunFolder:
    """Reads and writes one run's folder. Each file has one writer at a time; documents are replaced in one move."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()

    @staticmethod
    def create(root: Path | str, run_id: str | None = None) -> RunFolder:
        """Make a new, private folder under `root`."""
        run = RunFolder(Path(root) / (run_id or new_run_id()))
        run.path.parent.mkdir(parents=True, exist_ok=True)
        run.path.mkdir(mode=0o700)
        return run

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Where logs go, per attempt and rank."""
        return self.path / "logs"

    def newest_attempt(self) -> int:
        """The attempt that logged last, whether or not it came far enough to say so in the status."""
        found = (int(path.name.removeprefix("attempt-")) for path in self.logs.glob("attempt-*"))
        return max(found, default=0)

    def attempt_logs(self, attempt: int) -> Path:
        """The logs of one attempt; made if absent."""
        folder = self.logs / f"attempt-{attempt}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def log(self, attempt: int, rank: int) -> Path:
        """The log of one rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    # Documents ----------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        loaded: dict[str, Any] = yaml.safe_load((self.path / "config.yaml").read_text())
        return loaded

    def write_config(self, text: str) -> None:
        """Write `config.yaml`, resolved."""
        self._replace("config.yaml", text)

    def manifest(self) -> dict[str, Any]:
        """Who, when, versions, nodes, environment."""
        return self._read("manifest.json")

    def write_manifest(self, document: dict[str, Any]) -> None:
        """Write `manifest.json`."""
        self._write("manifest.json", document)

    def prediction(self) -> dict[str, Any] | None:
        """The prediction, or None where none could be made."""
        return self._read("prediction.json") or None

    def write_prediction(self, document: dict[str, Any]) -> None:
        """Write `prediction.json`."""
        self._write("prediction.json", document)

    def job(self) -> dict[str, Any]:
        """What was submitted: executor, id, environment of the scheduler's commands."""
        return self._read("job.json")

    def write_job(self, document: dict[str, Any]) -> None:
        """Write `job.json`."""
        self._write("job.json", document)

    def status(self) -> Status:
        """The state as last written; `submit.observe` holds it against the scheduler."""
        document = self._read("status.json")
        return Status.of(document) if document else Status("pending")

    def write_status(self, status: Status) -> None:
        """Write `status.json`, with the time."""
        self._write("status.json", asdict(status) | {"updated": utc_now()})

    def write_report(self, name: str, text: str) -> Path:
        """Write `report.html` or `report.md`; returns its path."""
        self._replace(name, text)
        return self.path / name

    # Rows ---------------------------------------------------------------------------------------------------------

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step."""
        return self._rows("metrics.jsonl")

    def append_metrics(self, row: dict[str, Any], attempt: int = 0) -> None:
        """Add one step."""
        self._append("metrics.jsonl", row, attempt)

    def measurements(self) -> list[dict[str, Any]]:
        """One row for each measured point of an operator."""
        return self._rows("measurements.jsonl")

    def append_measurement(self, row: dict[str, Any], attempt: int = 0) -> None:
        """Add one measured point."""
        self._append("measurements.jsonl", row, attempt)

    # Failures -----------------------------------------------------------------------------------------------------

    def write_failure(self, failure: Failure, attempt: int) -> None:
        """Leave word of why a rank failed, for whoever looks first."""
        path = self.attempt_logs(attempt) / f"rank-{failure.rank}.failure.json"
        self._replace(str(path.relative_to(self.path)), json.dumps(asdict(failure), indent=2))

    def silent_ranks(self, attempt: int) -> list[int]:
        """Ranks that began an attempt, by their logs, and left no word of a failure."""
        folder = self.logs / f"attempt-{attempt}"
        began = {int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.log")}
        return sorted(began - {failure.rank for failure in self.failures(attempt)})

    def failures(self, attempt: int) -> list[Failure]:
        """What failed ranks left, first failure first."""
        folder = self.logs / f"attempt-{attempt}"
        found = [Failure(**json.loads(path.read_text())) for path in folder.glob("rank-*.failure.json")]
        return sorted(found, key=lambda failure: failure.time_s)

    # Files --------------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            return {}
        loaded: dict[str, Any] = json.loads(path.read_text())
        return loaded

    def _write(self, name: str, document: dict[str, Any]) -> None:
        self._replace(name, json.dumps({"schema_version": SCHEMA_VERSION} | document, indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        path = self.path / name
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.path / name
        if not path.exists():
            return []
        lines = path.read_text().splitlines(keepends=True)
        # A last line without its newline is a write that a kill cut off.
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def _append(self, name: str, row: dict[str, Any], attempt: int) -> None:
        line = json.dumps(_finite({"schema_version": SCHEMA_VERSION, "attempt": attempt} | row))
        with (self.path / name).open("a") as file:
            file.write(line + "\n")


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have: a diverged loss is no reason for a broken row."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find(root: Path | str) -> list[RunFolder]:
    """All runs under `root`, oldest first."""
    return [RunFolder(path.parent) for path in sorted(Path(root).glob("*/manifest.json"))]
