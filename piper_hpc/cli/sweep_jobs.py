"""`python -m piper_hpc.jobs {status,wait,cancel,resume,dashboard}` of a sweep."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from piper_hpc.cli import sweep as show
from piper_hpc.cli.errors import INTERRUPTED
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report.points import PointRow, Reader, regret, totals
from piper_hpc.runs import RunFolder, find
from piper_hpc.runs.sweeps import SweepFolder, find_sweeps
from piper_hpc.runtime.slurm import ask
from piper_hpc.submit.scheduler import PENDING, RUNNING
from piper_hpc.sweep.owner import gone
from piper_hpc.sweep.pool import Left
from piper_hpc.sweep.start import submit

POLL_S = 5.0


def pick_sweep(runs: Path, name: str) -> SweepFolder | None:
    """The sweep of a name, at a path, or of a unique beginning or end of its name that no run's id has; else None."""
    if (Path(name) / "sweep.json").exists():
        return SweepFolder(name)
    known = find_sweeps(runs)
    if exact := [sweep for sweep in known if sweep.name == name]:
        return exact[0]
    matches = [sweep for sweep in known if sweep.name.startswith(name) or sweep.name.endswith(name)]
    of_a_run = any(run.run_id.startswith(name) or run.run_id.endswith(name) for run in find(runs))
    return matches[0] if len(matches) == 1 and not of_a_run else None


def status(sweep: SweepFolder, arguments: argparse.Namespace, console: Console) -> int:
    """A sweep's points, what they were predicted and measured to take, and what they cost."""
    rows, document = Reader(sweep).rows(show.lost_points(sweep)), sweep.document()
    if arguments.json:
        print(json.dumps(document_of(sweep, rows), indent=2))
        return 0
    console.print(f"[bold]{sweep.name}[/]  {len(rows)} points over {', '.join(document['axes'])}", highlight=False)
    show.show_rows(rows, document["kind"], console)
    for row in sweep.jobs():
        words = queue_words(row)
        console.print(f"array {row['id']}: {words or 'has ended'}", highlight=False)
    if left := sum(row.state == "pending" for row in rows):
        again = f"python -m piper_hpc.jobs resume {sweep.name}"
        if not any(queue_words(row) for row in sweep.jobs()) and not _held(sweep):
            console.print(f"{left} points are left over; go on with: {again}", highlight=False, soft_wrap=True)
    console.print(f"folder   {sweep.path}", highlight=False, soft_wrap=True)
    return 0


def document_of(sweep: SweepFolder, rows: Sequence[PointRow]) -> dict[str, Any]:
    """`jobs status SWEEP --json`."""
    document, found = sweep.document(), totals(rows)
    of_plan = regret(rows) if document["kind"] == "plan" else None
    return {
        **{key: document[key] for key in ("name", "created", "kind", "command", "axes", "code")},
        "path": str(sweep.path),
        "points": [asdict(row) for row in rows],
        "totals": asdict(found),
        "regret": asdict(of_plan) if of_plan is not None else None,
        "jobs": [{"id": row["id"], "group": row["group"], "tasks": row["tasks"]} for row in sweep.jobs()],
    }


def queue_words(job: dict[str, Any]) -> str:
    """Tasks of an array that wait or run, in words; empty where none does."""
    counts = _tasks(job)
    return ", ".join(f"{count} tasks {word}" for word, count in counts.items() if count)


def _tasks(job: dict[str, Any]) -> dict[str, int]:
    answer = ask(["squeue", "--noheader", "--array", "--jobs", job["id"], "--format", "%T"], job["environment"])
    words = answer.text.split() if answer.ok else []
    return {"run": sum(word in RUNNING for word in words), "wait": sum(word in PENDING for word in words)}


def _held(sweep: SweepFolder) -> list[dict[str, Any]]:
    """Owners of this machine that work at a point."""
    owners = [claims[-1].owner for claims in sweep.claims().values() if not claims[-1].end]
    return [owner for owner, is_gone in zip(owners, gone(owners), strict=True) if not is_gone]


def wait(sweep: SweepFolder, arguments: argparse.Namespace, console: Console) -> int:
    """Until no point runs or waits for a job that is in the queue; exit code 0 where all that may run completed."""
    reader = Reader(sweep)
    while True:
        rows = reader.rows(show.lost_points(sweep))
        queued = any(queue_words(row) for row in sweep.jobs())
        if totals(rows).is_over or not (queued or _held(sweep)):
            break
        time.sleep(POLL_S)
    if arguments.json:
        print(json.dumps(document_of(sweep, rows), indent=2))
    else:
        show.show_rows(rows, sweep.document()["kind"], console)
    return 0 if all(row.state in ("completed", "refused") for row in rows) else 1


def cancel(sweep: SweepFolder, arguments: argparse.Namespace, console: Console) -> int:
    """End a sweep's jobs; its points that have not ended stay pending, for `jobs resume`."""
    for row in sweep.jobs():
        if _tasks(row)["run"] + _tasks(row)["wait"]:
            answer = ask(["scancel", row["id"]], row["environment"])
            if not answer.ok:
                works = "the same command on a login node of its cluster"
                raise ConfigError(Problem("job", row["id"], f"scancel failed: {answer.reason}", works))
    for owner in _held(sweep):
        if owner["scheduler"] == "local" and owner["host"] == platform.node():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(owner["id"]), signal.SIGINT)
    deadline = time.monotonic() + 60
    while _held(sweep) and time.monotonic() < deadline:
        time.sleep(1)
    rows = Reader(sweep).rows(show.lost_points(sweep))
    if arguments.json:
        print(json.dumps(document_of(sweep, rows), indent=2))
    else:
        console.print(f"{sweep.name} cancelled: {show.totals_line(totals(rows))}", highlight=False, soft_wrap=True)
    return 0 if not _held(sweep) else 1


def resume(sweep: SweepFolder, arguments: argparse.Namespace, console: Console) -> int:
    """Go on with the points that nobody has finished or holds. Those that failed, stay: the same -m runs them again."""
    console = Console(stderr=True) if arguments.json else console
    free, busy = Left(sweep, None).look()
    rows = Reader(sweep).rows({point.index for point, _ in free})
    failed = [row.index for row in rows if row.state in ("failed", "cancelled")]
    if failed:
        console.print(f"{len(failed)} failed points stay as they are; the same -m runs them again", highlight=False)
    waiting = [row for row in sweep.jobs() if _tasks(row)["wait"]]
    if not free or waiting:
        why = f"array {waiting[0]['id']} waits to take them" if waiting else f"{len(busy)} running"
        console.print(f"{sweep.name}: {len(free)} points are left over, {why}", highlight=False)
    elif sweep.document()["groups"][0]["scheduler"] == "slurm":
        show.show_submitted(sweep, submit(sweep), console)
    else:
        try:
            rows = show.run_here(sweep, console)
        except KeyboardInterrupt:
            return INTERRUPTED
        if not arguments.json:
            show.show_rows(rows, sweep.document()["kind"], console)
    if arguments.json:
        print(json.dumps(document_of(sweep, Reader(sweep).rows(show.lost_points(sweep))), indent=2))
    return 0


def runs_and_sweeps(runs: Path, names: Sequence[str], pick: Any) -> tuple[SweepFolder | None, list[RunFolder]]:
    """What a page is of: one sweep, or runs; without a name the newest sweep. Raises ConfigError."""
    if not names:
        known = find_sweeps(runs)
        if not known:
            works = "python -m piper_hpc.launch -m train.seed=0,1, to make one"
            raise ConfigError(Problem("SWEEP", None, f"there is no sweep in {runs}", works))
        return known[-1], []
    if len(names) == 1 and (sweep := pick_sweep(runs, names[0])) is not None:
        return sweep, []
    return None, [pick(runs, name) for name in names]
