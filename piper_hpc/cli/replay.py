"""Replay one run's record into wandb, going on where the last replay ended, and remember what was sent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from piper_hpc.report.load import metrics
from piper_hpc.report.table import predicted_against_measured
from piper_hpc.runs import RecordError, RunFolder, Status
from piper_hpc.runs.folder import FILE, utc_now
from piper_hpc.spec.secrets import has_secret

ARTIFACT_FILES = ("report.html", "report.md", "prediction.json", "timeline.json", "trace.json")
"""What goes along as one artifact, of those that a run has."""
MARKER = "synced.json"
"""What an offline replay leaves in the folder that it wrote, once it is whole."""
UPLOAD_LIMIT_S = 600.0
"""The longest wait for what a replay sends to arrive."""


class ReplayError(Exception):
    """wandb did not take a run, or did not say that it has it; nothing is remembered as sent."""


@dataclass(frozen=True)
class Target:
    """Where runs are shown. mode: `offline` writes files for `wandb sync`; project, entity: wandb's."""

    mode: Literal["online", "offline"]
    project: str
    entity: str | None


@dataclass(frozen=True)
class Record:
    """What of a run can be shown. rows: one a step, attempts merged, by step; files: of the artifact."""

    rows: list[dict[str, Any]]
    status: Status
    files: list[Path]

    @staticmethod
    def read(run: RunFolder, status: Status) -> Record | None:
        """None for a run that has no step."""
        if not run.metrics():
            return None
        rows = metrics(run)
        if not all(isinstance(row["step"], int) for row in rows):
            raise RecordError(run.path, "metrics.jsonl has a step that is no whole number")
        files = [run.path / name for name in ARTIFACT_FILES if (run.path / name).is_file()] if status.ended else []
        return Record(rows, status, files)

    @property
    def last_step(self) -> int:
        """The last step of the record."""
        return int(self.rows[-1]["step"])

    def rows_digest(self, last_step: int) -> str:
        """SHA-256 of the rows up to a step."""
        return _digest(json.dumps(row, sort_keys=True).encode() for row in self.rows if row["step"] <= last_step)

    def files_digest(self) -> str | None:
        """SHA-256 of the artifact's files; None where there are none."""
        contents = (part for file in self.files for part in (file.name.encode(), file.read_bytes()))
        return _digest(contents) if self.files else None

    def facts(self) -> dict[str, Any]:
        """What tells whether all of it was sent."""
        return {
            "last_step": self.last_step,
            "rows_sha256": self.rows_digest(self.last_step),
            "state": self.status.state,
            "files_sha256": self.files_digest(),
        }


@dataclass(frozen=True)
class Replayed:
    """What became of one run. state: `synced`, `up_to_date`, or why not: `no_steps`, `failed`, `not_tried`."""

    run_id: str
    target: Target
    state: str
    steps_added: int = 0
    last_step: int | None = None
    url: str | None = None
    folder: str | None = None
    remark: str | None = None
    problem: str | None = None


def replay(run: RunFolder, status: Status, target: Target) -> Replayed:
    """Send to `target` what it does not have of the run, and remember it in `sync.json` once wandb has it.

    Raises RecordError for a record that cannot be read, ReplayError where wandb fails; then nothing is remembered, and
    the next replay asks wandb for the last step that it has.
    """
    with _alone(run), run.own_umask():
        record = Record.read(run, status)
        if record is None:
            return Replayed(run.run_id, target, "no_steps")
        for name in ("config.yaml", "report.md"):  # of a version that did not refuse them
            if (run.path / name).exists() and has_secret((run.path / name).read_text()):
                raise RecordError(run.path, f"{name} holds what looks like a secret: nothing of the run is sent")
        known = _known(run)
        sent = known.get(target)
        facts = record.facts()
        if sent is not None and facts == {key: sent.get(key) for key in facts}:
            return Replayed(run.run_id, target, "up_to_date", 0, record.last_step, sent.get("url"), sent.get("folder"))
        remark = None
        if sent is not None and sent.get("rows_sha256") != record.rows_digest(sent["last_step"]):
            remark = f"steps up to {sent['last_step']} were done again after they had been sent: wandb keeps the first"
        added, url, folder = _send(run, record, target, sent)
        for path in folder.rglob("*"):  # wandb's own process has the umask of the first run of this command
            if not path.is_symlink():
                path.chmod(run.mode if path.is_dir() else run.mode & FILE)
        entry = asdict(target) | facts | {"updated": utc_now(), "url": url, "folder": str(folder)}
        if target.mode == "offline":
            draft = folder / f".{MARKER}"
            draft.write_text(json.dumps(entry, indent=2) + "\n")
            os.replace(draft, folder / MARKER)
        run.write_synced(list((known | {target: entry}).values()))
        return Replayed(run.run_id, target, "synced", added, record.last_step, url, str(folder), remark)


def _send(run: RunFolder, record: Record, target: Target, sent: dict[str, Any] | None) -> tuple[int, str | None, Path]:
    """Steps added, the page of the run, and the folder of wandb's files."""
    from piper_hpc.tracking.wandb_run import WandbTracker

    config, summary, files = run.config(), _summary(run, record), _made(run.path / "sync")
    if target.mode == "offline":
        for unfinished in files.glob("wandb/offline-run-*"):
            if not (unfinished / MARKER).exists():  # a replay that was killed: this one starts where that did
                shutil.rmtree(unfinished)
    tracker = WandbTracker(target.mode, project=target.project, entity=target.entity, finish_limit_s=UPLOAD_LIMIT_S)
    try:
        tracker.start(config, run.path, files)
        first = tracker.next_step
        if target.mode == "offline":
            first = sent["last_step"] + 1 if sent is not None else 0
        elif first == 0:
            sent = None  # wandb has nothing of the run any more
        new = [row for row in record.rows if row["step"] >= first]
        for row in new:
            tracker.log(row)
        tracker.summarise(summary)
        if record.files and (sent is None or sent.get("files_sha256") != record.files_digest()):
            attached = record.files
            if target.mode == "offline":  # what is uploaded later is what there is now
                attached = [_copied(file, _made(tracker.files / "record")) for file in record.files]
            tracker.attach(f"record-{run.run_id}", attached)
        tracker.finish(record.status.state)
        found = record.last_step if target.mode == "offline" else tracker.last_step(record.last_step)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ReplayError(f"{type(error).__name__}: {reason}") from error
    if found < record.last_step:
        raise ReplayError(f"the last step that wandb has is {found}, not {record.last_step}; sync again")
    return len(new), tracker.url, tracker.files


def _summary(run: RunFolder, record: Record) -> dict[str, float | int | str]:
    """Medians over the steady steps, what was predicted of them and by how much that is off, as in the report."""
    values: dict[str, float | int | str] = {}
    for row in predicted_against_measured(run):
        values[f"measured/{row.key}"] = row.measured
        if row.predicted is not None:
            values[f"predicted/{row.key}"] = row.predicted
        if row.error_pct is not None:
            values[f"error_pct/{row.key}"] = row.error_pct
    if record.status.failure_class:
        values["failure_class"] = record.status.failure_class
    return values


def _known(run: RunFolder) -> dict[Target, dict[str, Any]]:
    """What was sent before: by what offline replays left, and by `sync.json`, which may be lost or torn."""
    found: list[dict[str, Any]] = []
    for marker in sorted((run.path / "sync").glob(f"wandb/offline-run-*/{MARKER}")):
        with suppress(OSError, ValueError):
            found.append(json.loads(marker.read_text()))
    with suppress(RecordError):
        found += run.synced()
    known = {}
    for entry in found:
        with suppress(KeyError):
            known[Target(entry["mode"], entry["project"], entry["entity"])] = entry
    return known


@contextmanager
def _alone(run: RunFolder) -> Iterator[None]:
    """Keep other replays of the run out. Raises ReplayError where one is going on."""
    handle = os.open(run.path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ReplayError("another sync of this run is going on") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _copied(file: Path, folder: Path) -> Path:
    return Path(shutil.copyfile(file, folder / file.name))


def _digest(parts: Iterator[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
