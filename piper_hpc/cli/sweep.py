"""A sweep at a terminal: what it is before it starts, and its points as a table while and after they run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from piper_hpc.config.errors import Problem
from piper_hpc.report.points import PointRow, Reader, Regret, Totals, regret, regret_line, totals
from piper_hpc.report.units import percent, seconds, size
from piper_hpc.runs import RecordError, RunFolder
from piper_hpc.runs.sweeps import SweepFolder, SweepPoint
from piper_hpc.sweep.pool import Left
from piper_hpc.sweep.start import Submitted, local_pool

STYLES = {"completed": "green", "running": "cyan", "failed": "red", "refused": "yellow", "cancelled": "yellow"}
SHOWN = 40
"""Rows of a table: of more points those that run or failed go first."""
REASONS = 8
"""Why points were refused; of more reasons the rest is counted."""
ORDER = ("running", "failed", "refused", "cancelled", "completed", "pending")
REFRESH_S = 1.0


def runs_of(runs: Sequence[RunFolder], name: str) -> list[RunFolder]:
    """The runs of the sweep `name`, in its order; a run whose manifest cannot be read is of none."""
    points = []
    for run in runs:
        with suppress(RecordError):
            sweep = run.manifest().get("sweep") or {}
            if sweep.get("name") == name:
                points.append((sweep["index"], run))
    return [run for _, run in sorted(points, key=lambda point: point[0])]


def lost_points(sweep: SweepFolder) -> set[int]:
    """Points that a job had taken which is gone: they wait again."""
    claimed = sweep.claims()
    return {point.index for point, _ in Left(sweep, None).look()[0] if point.index in claimed}


def show_points(points: Sequence[SweepPoint], document: Mapping[str, Any], console: Console) -> None:
    """What a new sweep is: what runs, what is refused and why, what was done before, and the cost of the whole."""
    new = [point for point in points if point.state == "new"]
    refused = [point for point in points if point.state == "refused"]
    done = [point for point in points if point.state == "done"]
    axes = ", ".join(document["axes"]) or "one point"
    _line(console, f"{len(points)} points over {axes}")
    for group, facts in enumerate(document["groups"]):
        number = sum(point.group == group for point in new)
        shape = f"{facts['nodes']} x {facts['ranks_per_node']} ranks of {facts['cluster']}"
        _line(console, f"  {number} to run on {shape}")
    if done:
        other = sorted({point.other_code for point in done if point.other_code})
        by = f", of them {sum(bool(point.other_code) for point in done)} by other code ({', '.join(other)})"
        again = "; sweep.strict_code=true runs those again"
        _line(console, f"  {len(done)} done before{by + again if other else ''}")
    if refused:
        _line(console, f"  {len(refused)} refused:", "yellow")
    reasons = by_reason({point.index: [Problem(**error) for error in point.errors] for point in refused})
    for text, indices in sorted(reasons.items(), key=lambda pair: -len(pair[1]))[:REASONS]:
        _line(console, f"    {numbers(indices)}: {text}", "yellow")
    if len(reasons) > REASONS:
        _line(console, f"    and {len(reasons) - REASONS} more reasons, which jobs dashboard shows", "yellow")
    if new:
        _line(console, _cost(new))


def _cost(new: Sequence[SweepPoint]) -> str:
    """The predicted cost of the whole."""
    known = [point for point in new if point.total_s is not None]
    if not known:
        return "cost: not predicted, as nothing is measured or known of this cluster; a first training run measures it"
    unknown = len(new) - len(known)
    beside = f"; {unknown} points have no prediction" if unknown else ""
    hours = sum(point.node_s for point in known) / 3600
    total_s = sum(one.total_s or 0.0 for one in known)
    starting = 1 - sum((one.steps or 0) * (one.step_time_s or 0.0) for one in known) / total_s
    return f"cost: {hours:,.3g} node-hours predicted, {100 * starting:.0f} % of it for starting{beside}"


def by_reason(refused: Mapping[int, Sequence[Problem]]) -> dict[str, list[int]]:
    """Points by what is wrong with them, each reason once."""
    reasons: dict[str, list[int]] = {}
    for index, problems in refused.items():
        for problem in problems:
            reasons.setdefault(str(problem), []).append(index)
    return reasons


def numbers(indices: Sequence[int]) -> str:
    """`point 3`, `points 1, 2 and 40 more`."""
    if len(indices) == 1:
        return f"point {indices[0]}"
    shown = ", ".join(map(str, indices[:8]))
    return f"points {shown}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")


def show_submitted(sweep: SweepFolder, submitted: Sequence[Submitted], console: Console) -> None:
    """What went into the queue, and how to come back."""
    for one in submitted:
        if one.tasks:
            tasks = f"{one.tasks} task{'s' if one.tasks > 1 else ''}"
            _line(console, f"submitted array {one.job_id}: {tasks} for {one.points} points")
        else:
            again = f"python -m piper_hpc.jobs resume {sweep.name}"
            _line(console, f"{one.points} points wait: the site's limit leaves no job; later: {again}", "yellow")
    _line(console, f"sweep {sweep.name}; follow it with: python -m piper_hpc.jobs status {sweep.name}")


def table(rows: Sequence[PointRow]) -> Table:
    """Points as a table: axes, state, predicted and measured."""
    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    axes = list(dict.fromkeys(key for row in rows for key in row.axes))
    for name in ("point", *(key.rpartition(".")[2] for key in axes), "state"):
        shown.add_column(name, overflow="fold")
    for name in ("step", "predicted", "measured", "error", "tokens/s", "peak"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        why = f" ({row.failure_class})" if row.failure_class else " (before)" if row.before else ""
        style = STYLES.get(row.state, "dim")
        shown.add_row(
            str(row.index),
            *(escape(str(row.axes.get(key, ""))) for key in axes),
            f"[{style}]{row.state}{escape(why)}[/]",
            f"{row.steps_done}/{row.steps}" if row.steps_done else "",
            seconds(row.predicted_step_s) if row.predicted_step_s else "",
            seconds(row.step_s) if row.step_s else "",
            percent(row.error_pct) if row.error_pct is not None else "",
            f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
            size(row.peak_bytes) if row.peak_bytes else "",
        )
    return shown


def some(rows: Sequence[PointRow], most: int = SHOWN) -> list[PointRow]:
    """Those to show where there are many: what runs or failed before what is as expected."""
    if len(rows) <= most:
        return list(rows)
    first = sorted(rows, key=lambda row: (ORDER.index(row.state), row.index))[:most]
    return sorted(first, key=lambda row: row.index)


def totals_line(found: Totals) -> str:
    """Counts and cost in a line."""
    counts = ", ".join(f"{count} {state}" for state, count in found.by_state.items())
    left = f", {found.left_node_hours:.3g} predicted to come" if found.left_node_hours else ""
    return f"{counts}; {found.spent_node_hours:.3g} node-hours spent{left}"


def show_rows(rows: Sequence[PointRow], kind: str, console: Console) -> None:
    """The table, and what it comes to."""
    shown = some(rows)
    console.print(table(shown))
    if len(shown) < len(rows):
        _line(console, f"{len(shown)} of {len(rows)} points; all: python -m piper_hpc.jobs dashboard")
    for row in shown:
        if row.state in ("failed", "refused") and row.reason:
            _line(console, f"point {row.index}: {row.failure_class or 'refused'}: {row.reason}", STYLES[row.state])
    _line(console, totals_line(totals(rows)))
    found = _regret(rows, kind)
    if found is not None:
        _line(console, regret_line(found))


def _regret(rows: Sequence[PointRow], kind: str) -> Regret | None:
    return regret(rows) if kind == "plan" else None


def run_here(sweep: SweepFolder, console: Console) -> list[PointRow]:
    """Run a sweep's points on this machine, one after the other, with a live table; returns how they ended.

    An interrupt ends the point that runs and leaves it and the others to `jobs resume`.
    """
    reader, told = Reader(sweep), {"next_s": 0.0}
    live = Live(console=console, auto_refresh=False, transient=True)
    said: dict[int, str] = {}

    def tell() -> None:
        if time.monotonic() < told["next_s"]:
            return
        told["next_s"] = time.monotonic() + REFRESH_S
        rows = reader.rows()
        if console.is_terminal:
            live.update(table(some(rows, max(4, console.height - 4))), refresh=True)
            return
        for row in rows:
            if row.state != said.setdefault(row.index, "pending"):
                said[row.index] = row.state
                _line(console, f"point {row.index}: {row.state} {row.failure_class or ''}".rstrip())

    pool = local_pool(sweep, tell, lambda text: None)
    try:
        with live:
            pool.drain()
    except KeyboardInterrupt:
        again = f"python -m piper_hpc.jobs resume {sweep.name}"
        _line(console, f"interrupted; what is left goes on with: {again}")
        raise
    return reader.rows()


def _line(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)
