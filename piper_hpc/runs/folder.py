"""A run's folder `runs/<run_id>/`: its files, their form, and how they are written so that a kill cannot tear them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
import zipfile
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from piper_hpc.runs.files import FILE, GROUP, PRIVATE, Files, RecordError, first_line, set_mode
from piper_hpc.runs.status import Failure, Status

OWN_END = "end.json"
"""The status with which a run's own processes ended it. It has one writer, so that no observer replaces it unseen."""


def utc_now() -> str:
    """The time now, ISO 8601 in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run_id() -> str:
    """An id that sorts by time and stays unique when two runs start in the same second."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class RunFolder(Files):
    """Reads and writes one run's folder. Each file has one writer at a time; documents are replaced in one move."""

    @staticmethod
    def create(root: Path | str, run_id: str | None = None, mode: int = PRIVATE) -> RunFolder:
        """Make a new folder under `root`. mode: of the folder; what is made in it later follows from it."""
        run = RunFolder(Path(root) / (run_id or new_run_id()))
        if not run.path.parent.exists():
            run.path.parent.mkdir(parents=True, exist_ok=True)
            set_mode(run.path.parent, run.path.parent.stat().st_mode | mode & GROUP)
        run.path.mkdir(mode=PRIVATE)
        set_mode(run.path, mode)
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

    @property
    def batch(self) -> Path:
        """Where the batch script is kept as it was submitted."""
        return self.logs / "batch"

    def attempts(self) -> list[int]:
        """Numbers of the attempts that began, in order."""
        found = (path.name.removeprefix("attempt-") for path in self.logs.glob("attempt-*"))
        return sorted(int(number) for number in found if number.isdecimal())

    def newest_attempt(self) -> int:
        """The attempt that logged last, whether or not it came far enough to say so in the status."""
        return max(self.attempts(), default=0)

    def begin_attempt(self, number: int) -> bool:
        """Make the folder of an attempt's logs; False where it is there: somebody else has the number."""
        self._make(self.logs)
        try:
            (self.logs / f"attempt-{number}").mkdir(mode=PRIVATE)
        except FileExistsError:
            return False
        set_mode(self.logs / f"attempt-{number}", self.mode)
        return True

    def attempt(self, number: int) -> dict[str, Any]:
        """What is known of an attempt, see piper_hpc.runs.attempts; empty in a record that is older than these."""
        return self._read(f"logs/attempt-{number}/attempt.json")

    def write_attempt(self, number: int, document: dict[str, Any]) -> None:
        """Write `attempt.json` of an attempt that began."""
        self._write(f"logs/attempt-{number}/attempt.json", document)

    def attempt_logs(self, attempt: int) -> Path:
        """The logs of one attempt; made if absent."""
        self._make(self.logs)
        return self._make(self.logs / f"attempt-{attempt}")

    def log(self, attempt: int, rank: int) -> Path:
        """The log of one rank."""
        return self.attempt_logs(attempt) / f"rank-{rank}.log"

    # Documents: each reader raises RecordError for a file that is torn, unreadable or of another schema_version. ----

    def config(self) -> dict[str, Any]:
        """The resolved configuration. Raises RecordError where there is none."""
        if not (self.path / "config.yaml").exists():
            raise RecordError(self.path, "config.yaml is missing")
        try:
            loaded = yaml.safe_load(self._text("config.yaml"))
        except (yaml.YAMLError, RecursionError) as error:
            raise RecordError(self.path, f"config.yaml is no YAML ({first_line(error)})") from error
        return self._mapping("config.yaml", loaded)

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
        job = self._read("job.json")
        number, variables = job.get("id"), job.get("environment")
        whole = (
            job.get("scheduler") in ("local", "slurm")
            and isinstance(number, str)
            and (job["scheduler"] == "slurm" or number.isdecimal())
            and isinstance(variables, dict)
            and all(isinstance(value, str) for value in variables.values())
        )
        if job and not whole:
            raise RecordError(self.path, "job.json must have the scheduler (local or slurm), its id and environment")
        return job

    def write_job(self, document: dict[str, Any]) -> None:
        """Write `job.json`."""
        self._write("job.json", document)

    def status(self) -> Status:
        """The state as last written; `submit.observe` holds it against the scheduler.

        The run's own last word of this attempt or a later one counts before what was seen from outside.
        """
        status, own = self._status("status.json"), self._own_end()
        return own if own is not None and own.attempt >= status.attempt else status

    def _own_end(self) -> Status | None:
        own = self._status(OWN_END)  # pending where there is none
        return own if own.ended else None

    def _status(self, name: str) -> Status:
        document = self._read(name)
        try:
            return Status.of(document) if document else Status("pending")
        except (TypeError, ValueError) as error:
            raise RecordError(self.path, f"{name}: {first_line(error)}") from error

    def write_status(self, status: Status) -> None:
        """Write `status.json`, with the time, as the run's own processes do; their last word also where no observer
        writes."""
        if status.state == "completed" and status.failure_class is not None:  # an observer was too early
            status = replace(status, failure_class=None, reason=None, evidence=())
        document = asdict(status) | {"updated": utc_now()}
        if status.ended or (self.path / OWN_END).exists():  # of an earlier attempt: replaced, as readers may be at it
            self._write(OWN_END, document)
        self._write("status.json", document)

    def write_observed(self, status: Status) -> None:
        """Write `status.json` as somebody else found the run; its own last word stays, also one still on its way."""
        self._write("status.json", asdict(status) | {"updated": utc_now()})

    def said_its_end(self) -> bool:
        """Whether the run's own processes ended it, and no observer did."""
        return self._own_end() is not None

    def last_written_s(self) -> float:
        """Unix time of the newest file of the record or log folder, as seen from here; 0 where there is none."""
        newest_s = 0.0
        for path in (*self.path.glob("*.json*"), *self.logs.glob("attempt-*"), *self.logs.glob("attempt-*/rank-0.log")):
            with contextlib.suppress(FileNotFoundError):  # a draft, moved just now
                newest_s = max(newest_s, path.stat().st_mtime)
        return newest_s

    def write_routed(self, counts: np.ndarray) -> None:
        """Choices of each expert in the counted micro-batches of every step, int [steps, samples, layers, experts]."""
        draft = self.path / ".routed.npz"  # savez adds the ending to any other
        np.savez_compressed(draft, counts=counts.astype(np.int32))
        draft.chmod(self.mode & FILE)
        os.replace(draft, self.path / "routed.npz")

    def routed(self) -> np.ndarray | None:
        """What `write_routed` wrote, None where the run kept none (train.routing.record)."""
        path = self.path / "routed.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as kept:
                return np.asarray(kept["counts"], np.int64)
        except (OSError, EOFError, ValueError, LookupError, zipfile.BadZipFile) as error:
            raise RecordError(self.path, f"routed.npz cannot be read ({first_line(error)})") from error

    def synced(self) -> list[dict[str, Any]]:
        """What `jobs sync` sent, one mapping for each place that it sent to."""
        targets = self._read("sync.json").get("targets", [])
        if not isinstance(targets, list) or not all(isinstance(target, dict) for target in targets):
            raise RecordError(self.path, "sync.json must have targets, a list of mappings")
        return targets

    def write_synced(self, targets: list[dict[str, Any]]) -> None:
        """Write `sync.json`."""
        self._write("sync.json", {"targets": targets})

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
        began = (path.stem.removeprefix("rank-") for path in folder.glob("rank-*.log"))
        failed = {failure.rank for failure in self.failures(attempt)}
        return sorted({int(rank) for rank in began if rank.isdecimal()} - failed)

    def failures(self, attempt: int) -> list[Failure]:
        """What failed ranks left, first failure first."""
        folder = self.logs / f"attempt-{attempt}"
        names = [str(path.relative_to(self.path)) for path in folder.glob("rank-*.failure.json")]
        return sorted(map(self._failure, names), key=lambda failure: failure.time_s)

    def _failure(self, name: str) -> Failure:
        try:
            found = self._json(name, self._text(name))
            return Failure(**found | {"evidence": tuple(found.get("evidence") or ())})
        except (TypeError, ValueError) as error:
            raise RecordError(self.path, f"{name}: {first_line(error)}") from error


def find(root: Path | str) -> list[RunFolder]:
    """All folders under `root` that have a run's manifest or configuration, oldest first; a kill may have left one
    of the two alone, and what they hold is not looked at."""
    found = {path.parent for name in ("manifest.json", "config.yaml") for path in Path(root).glob(f"*/{name}")}
    return [RunFolder(path) for path in sorted(found)]
