"""Load run folders for reports and validation: by path or id, with their metrics and steady steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from piper_hpc.runs import RecordError, RunFolder, find

Row = dict[str, Any]


TERMS_OF_LATER_VERSIONS = {"weight_grad_s": 0.0}
"""Terms that earlier records lack, with the seconds that they stand for there: no backward was split then."""


class UsageError(Exception):
    """What was asked for cannot be answered; the message names the value, the rule, and a value that works."""


def open_run(name: str | Path, root: Path | str = "runs") -> RunFolder:
    """The run at a path, or of an id under `root`. Raises UsageError where there is none."""
    for path in (Path(name), Path(root) / name):
        if (path / "manifest.json").is_file():
            return RunFolder(path)
    known = find(root) if Path(root).is_dir() else []
    works = f"for example {known[-1].path}" if known else "make one with: python -m piper_hpc.launch"
    raise UsageError(f"RUN={name}: must be a run's folder or its id under {root}/ (no manifest.json there); {works}")


def comparable(root: Path | str = "runs") -> tuple[list[RunFolder], list[str]]:
    """The completed training runs under `root` that have a prediction, and a line for each folder that cannot be read.

    Raises UsageError where there is no such run.
    """
    runs, skipped = [], []
    for run in find(root):
        try:
            if run.status().state == "completed" and run.prediction() and run.metrics():
                runs.append(run)
        except RecordError as error:
            skipped.append(f"{run.run_id}: {error.reason}")
    if not runs:
        rule = "holds no completed training run with a prediction"
        raise UsageError("\n".join([f"{root}/ {rule}; make one with: python -m piper_hpc.launch", *skipped]))
    return runs, skipped


def metrics(run: RunFolder) -> list[Row]:
    """One row for each step, in order; a step that a later attempt repeated counts as it went last.

    Raises UsageError for a run that trained no step.
    """
    latest = {row["step"]: _numbers(row) for row in sorted(run.metrics(), key=lambda row: row["attempt"])}
    if not latest:
        raise UsageError(
            f"RUN={run.path}: must have trained a step, but metrics.jsonl has no row (state: {run.status().state}); "
            "use a run of task=train"
        )
    return [latest[step] for step in sorted(latest)]


def _numbers(row: Row) -> Row:
    """JSON has no NaN: what was not finite was written as null. Terms that the record is too old for are added."""
    numbers = {key: math.nan if value is None else value for key, value in row.items()}
    if "stages" not in row:  # not timed by term
        return numbers
    return TERMS_OF_LATER_VERSIONS | numbers | {"stages": [TERMS_OF_LATER_VERSIONS | stage for stage in row["stages"]]}


def steady(rows: Sequence[Row]) -> list[Row]:
    """The rows that every reported figure is taken over: all whose `warmup` is not true.

    Training marks the first steps of each attempt, whose times include what happens once. A run that ended before its
    first steady step has none: then all its rows are taken, which `steps` in every output shows.
    """
    return [row for row in rows if not row.get("warmup")] or list(rows)


def timed(rows: Sequence[Row]) -> bool:
    """Whether every step was timed by term (`train.timing`)."""
    return all("stages" in row for row in rows)


def typical(rows: Sequence[Row], key: str) -> float:
    """The median of one quantity over steady rows."""
    return median(row[key] for row in rows)
