"""A run's folder `runs/<run_id>/`: its files, their form, and how they are written so that a kill cannot tear them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from piper_hpc.runs.status import Failure, Status
from piper_hpc.spec.problem import Problem, SpecError

SCHEMA_VERSION = 1
PRIVATE, GROUP, FILE = 0o700, 0o070, 0o666
"""Mode of a folder for its user alone; the group's share of a mode; what a file has of its folder's mode."""
OWN_END = "end.json"
"""The status with which a run's own processes ended it. It has one writer, so that no observer replaces it unseen."""


class RecordError(SpecError):
    """A file of a run's folder that cannot be read as what it must be: `reason` names the file and the rule."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        works = "a run that `python -m piper_hpc.jobs list` shows without a remark"
        super().__init__(Problem("RUN", str(path), reason, works))


@contextmanager
def understood(run: RunFolder) -> Iterator[None]:
    """Raise RecordError where what is read of a run in this `with` has not the keys and types that it must have."""
    try:
        yield
    except SpecError:
        raise  # it says already what is wrong
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        # Each file is JSON of this version; it was written by something else nevertheless.
        raise RecordError(run.path, f"its record cannot be read ({type(error).__name__}: {error})") from error


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
    def create(root: Path | str, run_id: str | None = None, mode: int = PRIVATE) -> RunFolder:
        """Make a new folder under `root`. mode: of the folder; what is made in it later follows from it."""
        run = RunFolder(Path(root) / (run_id or new_run_id()))
        if not run.path.parent.exists():
            run.path.parent.mkdir(parents=True, exist_ok=True)
            _set_mode(run.path.parent, run.path.parent.stat().st_mode | mode & GROUP)
        run.path.mkdir(mode=PRIVATE)
        _set_mode(run.path, mode)
        return run

    @property
    def mode(self) -> int:
        """Who may enter, read and write it: the folder's own mode, which its folders and files have too."""
        return self.path.stat().st_mode & 0o777

    def take_umask(self) -> int:
        """Have all that this process and its children make from now on follow the folder's mode; returns the umask that
        was before."""
        return os.umask(0o777 & ~self.mode)

    @contextmanager
    def own_umask(self) -> Iterator[None]:
        """`take_umask` for the length of a `with`."""
        before = self.take_umask()
        try:
            yield
        finally:
            os.umask(before)

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

    def newest_attempt(self) -> int:
        """The attempt that logged last, whether or not it came far enough to say so in the status."""
        found = (path.name.removeprefix("attempt-") for path in self.logs.glob("attempt-*"))
        return max((int(number) for number in found if number.isdecimal()), default=0)

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
            raise RecordError(self.path, f"config.yaml is no YAML ({_first_line(error)})") from error
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
        status = self._status("status.json")
        own = self._status(OWN_END) if (self.path / OWN_END).exists() else None
        return own if own is not None and own.attempt >= status.attempt else status

    def _status(self, name: str) -> Status:
        document = self._read(name)
        try:
            return Status.of(document) if document else Status("pending")
        except (TypeError, ValueError) as error:
            raise RecordError(self.path, f"{name}: {_first_line(error)}") from error

    def write_status(self, status: Status) -> None:
        """Write `status.json`, with the time, as the run's own processes do; their last word also where no observer
        writes."""
        document = asdict(status) | {"updated": utc_now()}
        if status.ended:
            self._write(OWN_END, document)
        else:
            (self.path / OWN_END).unlink(missing_ok=True)
        self._write("status.json", document)

    def write_observed(self, status: Status) -> None:
        """Write `status.json` as somebody else found the run; its own last word stays, also one still on its way."""
        self._write("status.json", asdict(status) | {"updated": utc_now()})

    def said_its_end(self) -> bool:
        """Whether the run's own processes ended it, and no observer did."""
        return (self.path / OWN_END).exists()

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
            raise RecordError(self.path, f"routed.npz cannot be read ({_first_line(error)})") from error

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
            return Failure(**self._json(name, self._text(name)))
        except (TypeError, ValueError) as error:
            raise RecordError(self.path, f"{name}: {_first_line(error)}") from error

    # Files --------------------------------------------------------------------------------------------------------

    def _read(self, name: str) -> dict[str, Any]:
        return self._json(name, self._text(name)) if (self.path / name).exists() else {}

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(self.path, f"{name} cannot be read ({_first_line(error)})") from error

    def _json(self, name: str, text: str) -> dict[str, Any]:
        try:
            loaded = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RecordError(self.path, f"{name} is no JSON ({_first_line(error)})") from error
        document = self._mapping(name, loaded)
        version = document.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise RecordError(self.path, f"{name} has schema_version {version!r}, read here is {SCHEMA_VERSION}")
        return document

    def _mapping(self, name: str, loaded: Any) -> dict[str, Any]:
        if not isinstance(loaded, dict):
            raise RecordError(self.path, f"{name} must hold a mapping of keys to values")
        return loaded

    def _write(self, name: str, document: dict[str, Any]) -> None:
        self._replace(name, json.dumps({"schema_version": SCHEMA_VERSION} | document, indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        path = self.path / name
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            os.fchmod(file.fileno(), self.mode & FILE)  # drafts of tempfile are the user's alone
            file.write(text)
        os.replace(file.name, path)

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if not (self.path / name).exists():
            return []
        lines = self._text(name).splitlines(keepends=True)
        # A last line without its newline is a write that a kill cut off.
        return [self._json(name, line) for line in lines if line.endswith("\n") and line.strip()]

    def _append(self, name: str, row: dict[str, Any], attempt: int) -> None:
        line = json.dumps(_finite({"schema_version": SCHEMA_VERSION, "attempt": attempt} | row))
        is_new = not (self.path / name).exists()
        with (self.path / name).open("a") as file:
            if is_new:
                os.fchmod(file.fileno(), self.mode & FILE)
            file.write(line + "\n")

    def _make(self, folder: Path) -> Path:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=PRIVATE)
            _set_mode(folder, self.mode)
        return folder


def _set_mode(folder: Path, mode: int) -> None:
    """chmod, with the set-group-ID bit as it is: shared projects have it on, and chmod(2) takes it off."""
    folder.chmod(mode & 0o777 | folder.stat().st_mode & stat.S_ISGID)


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have: a diverged loss is no reason for a broken row."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def find(root: Path | str) -> list[RunFolder]:
    """All folders under `root` that have a run's manifest or configuration, oldest first; a kill may have left one
    of the two alone, and what they hold is not looked at."""
    found = {path.parent for name in ("manifest.json", "config.yaml") for path in Path(root).glob(f"*/{name}")}
    return [RunFolder(path) for path in sorted(found)]
