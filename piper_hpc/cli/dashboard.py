"""`python -m piper_hpc.jobs dashboard [SWEEP|RUN ...]`: a page of many points, for a person."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from piper_hpc.cli import sweep as show
from piper_hpc.cli.sweep_jobs import runs_and_sweeps
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report import dashboard
from piper_hpc.report.points import PointRow, Reader, rows_of_runs, totals
from piper_hpc.runs import RunFolder
from piper_hpc.submit.outcome import observe, observe_all

EVERY_S = 10.0
PAGE = "dashboard.html"


def register(commands: Any, shared: argparse.ArgumentParser, pick: Callable[[Path, str], RunFolder]) -> None:
    """Add the command to those of `jobs`. pick: the run that a word names under a folder of runs."""
    command = commands.add_parser("dashboard", parents=[shared], help=write.__doc__, description=write.__doc__)
    command.set_defaults(action=lambda arguments, console: write(arguments, console, pick))
    command.add_argument("names", nargs="*", metavar="SWEEP|RUN", help="a sweep, or runs; default: the newest sweep")
    command.add_argument("-o", "--output", type=Path, help=f"the page (default: {PAGE} in the sweep's folder, or here)")
    command.add_argument("-f", "--follow", action="store_true", help="write it anew until nothing runs or waits")


def write(arguments: argparse.Namespace, console: Console, pick: Callable[[Path, str], RunFolder]) -> int:
    """Write one page, which opens offline, of a sweep or of runs: table, accuracy, memory, failures, cost."""
    sweep, runs = runs_and_sweeps(arguments.runs, arguments.names, pick)
    if sweep is not None:
        document = sweep.document()
        words = ["python -m piper_hpc.launch", *map(shlex.quote, document["command"][1:])]
        subject = dashboard.Subject(sweep.name, document["kind"], " ".join(words), str(sweep.path))
        path = arguments.output or sweep.path / PAGE
        reader = Reader(sweep)

        def rows() -> list[PointRow]:
            return reader.rows(show.lost_points(sweep))
    else:
        subject = dashboard.Subject(f"{len(runs)} runs", "runs", "", str(arguments.runs.resolve()))
        path = arguments.output or Path(PAGE)

        def rows() -> list[PointRow]:
            jobs = observe_all(runs)
            for run in runs:
                observe(run, jobs)  # one that ended unseen is recorded as what it became
            return rows_of_runs(runs)

    while True:
        found = rows()
        _write(path, subject, found)
        if not arguments.follow or totals(found).is_over:
            break
        time.sleep(EVERY_S)
    if arguments.json:
        print(json.dumps({"path": str(path.resolve()), "points": len(found), "state": totals(found).by_state}))
    else:
        console.print(f"wrote {path.resolve()}: {show.totals_line(totals(found))}", highlight=False, soft_wrap=True)
    return 0


def _write(path: Path, subject: dashboard.Subject, rows: Sequence[PointRow]) -> None:
    """In one move, as a browser may be reading; with the mode of the folder's owner alone where that is private."""
    try:
        text = dashboard.page(subject, rows)
    except ImportError as error:
        rule = "is not installed, and makes the page"
        raise ConfigError(Problem("dashboard", error.name, rule, "pip install plotly jinja2")) from error
    draft = path.with_name(f".{path.name}")
    draft.write_text(text)
    draft.chmod(path.parent.stat().st_mode & 0o666)
    draft.replace(path)
