"""Follow a run to its end: a live progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from piper_hpc.cli.describe import describe, queue, waiting
from piper_hpc.cli.eta import eta
from piper_hpc.cli.measured import LiveTable
from piper_hpc.runs import RunFolder, Status
from piper_hpc.submit.outcome import AWAITED, observe, observe_all
from piper_hpc.submit.scheduler import JobState

POLL_S = 0.3
"""Between looks at the record."""
ASK_S, ASK_MOST_S = 2.0, 60.0
"""Between questions to Slurm: at first, and for a job that waits long; one that runs is asked for every few seconds."""
LINES = 12
"""How many lines a whole run gets where there is no terminal."""


def follow(run: RunFolder, steps: int, console: Console, *, wide: bool = False) -> Status:
    """Show a run's steps as they come until it ends, of a wide micro-benchmark its rows; returns how it ended."""
    table = LiveTable()
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("{task.fields[eta]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    every = max(1, steps // LINES)
    shown, told, watch = 0, ("", ""), Watch(run)
    prediction = run.prediction() or {}
    with progress:
        bar = progress.add_task("waiting", total=steps, figures="", eta="")
        while True:
            # The state first: rows written before the end are then surely read.
            status = watch.status()
            rows, measurements = run.metrics(), run.measurements()
            left = steps - (rows[-1]["step"] + 1 if rows else 0)
            expected = eta(status.state, left, rows, prediction, watch.said, time.time())
            ends = f"ETA {expected}" if expected is not None else ""
            if wide:
                for line in table.lines(measurements):
                    progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            state = f"{status.state} {waiting(queue(watch.said)) or status.reason or ''}".rstrip()
            if rows:
                done, last = rows[-1]["step"] + 1, figures(rows[-1])
                progress.update(bar, description="training", completed=done, figures=last, eta=ends)
            elif measurements:
                progress.update(bar, description=f"measuring operators ({len(measurements)} points)")
            else:
                progress.update(bar, description=state, eta=ends)
            if not console.is_terminal:
                why = (status.state, status.reason or "")
                if status.reason and why != told and not status.ended:
                    console.print(state, highlight=False, markup=False, soft_wrap=True)
                told = why
                for row in rows[shown:]:
                    done = row["step"] + 1
                    if done % every == 0 or done == 1:
                        now = f"  {ends}" if row is rows[-1] and ends else ""
                        console.print(f"step {done}/{steps}  {figures(row)}{now}", highlight=False)
                shown = len(rows)
            if status.ended:
                return status
            time.sleep(POLL_S)


def tell_end(run: RunFolder, steps: int, console: Console, *, as_json: bool) -> int:
    """Follow a run and say how it ended, in words or as `describe`'s document; 0 where it completed, else 1."""
    status = follow(run, steps, Console(stderr=True) if as_json else console)
    if as_json:
        print(json.dumps(describe(run), indent=2))
    else:
        reason = f": {status.failure_class or ''} {status.reason}" if status.reason else ""
        console.print(f"{run.run_id} {status.state}{reason}", highlight=False, markup=False)
    return 0 if status.state == "completed" else 1


class Watch:
    """A run's status, for whoever asks often: the record every time, the scheduler seldom."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._slurm = (run.job() or {}).get("scheduler") == "slurm"
        self._every_s, self._next_s = ASK_S, 0.0
        self._seen: Status | None = None
        self.said: JobState | None = None
        """What Slurm said of the job when it was asked last."""

    def status(self) -> Status:
        """As the record has it; where that is no end, as the scheduler said when it was asked last."""
        recorded, now_s = self._run.status(), time.monotonic()
        if recorded.ended:
            return recorded
        if self._slurm and self._seen is not None and now_s < self._next_s:
            # The record knows of a start before Slurm is asked again; why a job waits Slurm alone knows.
            return self._seen if recorded.state == "pending" or self._seen.reason == AWAITED else recorded
        jobs = observe_all([self._run])
        self.said = next(iter(jobs.values()), None)
        self._seen = observe(self._run, jobs)
        self._every_s = min(1.5 * self._every_s, ASK_MOST_S) if self._seen.state == "pending" else ASK_S
        self._next_s = now_s + self._every_s
        return self._seen


def figures(row: dict[str, Any]) -> str:
    """Loss, rate and MFU of a step, for one line."""
    loss = "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
    mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else "unknown"  # no peak was measured
    return f"loss {loss}  {row['tokens_per_s']:,.0f} tokens/s  MFU {mfu}"
