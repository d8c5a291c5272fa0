"""A sweep's folder `runs/sweeps/NAME/`: its points, what it submitted, and which job has taken which point."""

from __future__ import annotations

import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piper_hpc.runs.files import FILE, GROUP, PRIVATE, Files, RecordError, set_mode
from piper_hpc.runs.folder import RunFolder

FOLDER = "sweeps"
"""Beside the runs."""
_CLAIM = re.compile(r"(\d+)\.(\d+)(\.end)?\.json")


@dataclass(frozen=True)
class SweepPoint:
    """One point. state: `new` (to be run), `refused` (errors say why) or `done` (run_id is an earlier run's).

    group: which points share jobs; of the prediction: step_time_s, peak_bytes of the fullest rank, and what the whole
    point takes with its start, total_s, None where nothing is predicted; limit_bytes: of a rank.
    """

    index: int
    axes: dict[str, Any]
    state: str
    identity: str | None = None
    run_id: str | None = None
    group: int | None = None
    nodes: int | None = None
    ranks: int | None = None
    steps: int | None = None
    step_time_s: float | None = None
    total_s: float | None = None
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    other_code: str | None = None
    errors: list[dict[str, Any]] = field(default_factory=list)

    @property
    def node_s(self) -> float:
        """Predicted node-seconds; 0 where nothing is predicted or run."""
        return (self.total_s or 0.0) * (self.nodes or 0) if self.state == "new" else 0.0


@dataclass(frozen=True)
class Claim:
    """A job's hold on a point. owner: the job, see piper_hpc.sweep.owner; end: how it ended, empty while it has not."""

    index: int
    attempt: int
    owner: dict[str, Any]
    end: dict[str, Any]

    @property
    def seconds(self) -> float | None:
        """From the claim to its end; None before."""
        return self.end["time_s"] - self.owner["time_s"] if self.end else None


class SweepFolder(Files):
    """Reads and writes one sweep's folder. Points are written once; claims by whichever job is first."""

    @staticmethod
    def create(runs: Path | str, name: str, mode: int = PRIVATE) -> SweepFolder:
        """Make a new folder under `runs`/sweeps."""
        sweep = SweepFolder(Path(runs) / FOLDER / name)
        for folder in (sweep.path.parent.parent, sweep.path.parent):
            if not folder.exists():
                folder.mkdir(parents=True, exist_ok=True)
                set_mode(folder, folder.stat().st_mode | mode & GROUP)
        sweep.path.mkdir(mode=PRIVATE)
        set_mode(sweep.path, mode)
        sweep._make(sweep.path / "claims")
        sweep._make(sweep.logs)
        return sweep

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def logs(self) -> Path:
        """What jobs of its pools print."""
        return self.path / "logs"

    @property
    def runs(self) -> Path:
        """Where the runs of its points are."""
        return self.path.parent.parent

    def document(self) -> dict[str, Any]:
        """`sweep.json`: the command, the axes, the groups, the cost."""
        return self._read("sweep.json")

    def write_document(self, document: dict[str, Any]) -> None:
        """Write `sweep.json`."""
        self._write("sweep.json", document)

    def points(self) -> list[SweepPoint]:
        """All points, in order."""
        names = SweepPoint.__dataclass_fields__
        try:
            return [SweepPoint(**{key: row[key] for key in names if key in row}) for row in self._rows("points.jsonl")]
        except TypeError as error:
            raise RecordError(self.path, f"points.jsonl: {error}") from error

    def write_points(self, points: Iterable[SweepPoint]) -> None:
        """Write `points.jsonl`, whole."""
        rows = ({"schema_version": 1, "attempt": 0} | vars(point) for point in points)
        self._replace("points.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def jobs(self) -> list[dict[str, Any]]:
        """What was submitted, one row for each array: `group`, `id`, `tasks`, `environment`."""
        return self._rows("jobs.jsonl")

    def append_job(self, row: dict[str, Any]) -> None:
        """Add what was submitted."""
        self._append("jobs.jsonl", row, 0)

    def run(self, point: SweepPoint) -> RunFolder | None:
        """The run of a point, None of one that has none."""
        return None if point.run_id is None else RunFolder(self.runs / point.run_id)

    # Claims: one file each, made whole by one link, so that of several jobs one alone gets it. -----------------------

    def claim(self, index: int, attempt: int, owner: dict[str, Any]) -> bool:
        """Take a point for `owner`; False where somebody else was first."""
        return self._link(f"{index}.{attempt}.json", owner)

    def end_claim(self, claim: Claim, end: dict[str, Any]) -> None:
        """Record how the owner's work at a point ended."""
        self._link(f"{claim.index}.{claim.attempt}.end.json", end)

    def claims(self, known: dict[tuple[int, int], Claim] | None = None) -> dict[int, list[Claim]]:
        """All claims by point, oldest first. known: ended ones, kept by whoever asks often; they are added to it."""
        kept = {} if known is None else known
        ended: dict[tuple[int, int], bool] = {}
        for name in os.listdir(self.path / "claims"):
            if match := _CLAIM.fullmatch(name):
                key = int(match[1]), int(match[2])
                ended[key] = ended.get(key, False) or match[3] is not None
        by_point: dict[int, list[Claim]] = {}
        for key in sorted(ended):
            claim = kept.get(key) or self._claim(*key, ended=ended[key])
            if claim.end:
                kept[key] = claim
            by_point.setdefault(key[0], []).append(claim)
        return by_point

    def _claim(self, index: int, attempt: int, *, ended: bool) -> Claim:
        stem = f"claims/{index}.{attempt}"
        return Claim(index, attempt, self._read(f"{stem}.json"), self._read(f"{stem}.end.json") if ended else {})

    def _link(self, name: str, document: dict[str, Any]) -> bool:
        """Write a document under a name that must be free. A link is atomic on NFS and Lustre too."""
        target = self.path / "claims" / name
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{name}.", delete=False) as file:
            os.fchmod(file.fileno(), self.mode & FILE)
            file.write(json.dumps({"schema_version": 1} | document) + "\n")
        try:
            os.link(file.name, target)
        except FileExistsError:
            return False
        finally:
            os.unlink(file.name)
        return True


def new_name(now: str) -> str:
    """A sweep's name: a time, `20261129-201530`, with letters behind it where two start in one second."""
    return f"{now}-{secrets.token_hex(2)}"


def find_sweeps(runs: Path | str) -> list[SweepFolder]:
    """All sweeps beside the runs, oldest first."""
    return [SweepFolder(path.parent) for path in sorted((Path(runs) / FOLDER).glob("*/sweep.json"))]
