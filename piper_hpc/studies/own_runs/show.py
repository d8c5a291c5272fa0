"""The tables of `make validate-testbed`, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from piper_hpc.report.table import NAMES
from piper_hpc.report.units import percent, seconds, size
from piper_hpc.studies.own_runs.judge import Bar, Result, Value
from piper_hpc.studies.tables import markdown_table

COLUMNS = (
    "point",
    "predicted",
    "measured",
    "error",
    "repeats differ by",
    "90 % interval",
    "terms above 10 %",
    "CPU of layers",
    "memory",
)
BAR_COLUMNS = ("bar", "found", "asked", "")


def cells(each: Result) -> tuple[str, ...]:
    """One point, in the order of COLUMNS; errors of terms and memory beside it."""
    step = each.step
    interval = "none" if step.low is None or step.high is None else f"{seconds(step.low)} to {seconds(step.high)}"
    return (
        each.point,
        seconds(step.predicted),
        seconds(step.measured),
        percent(100 * step.error),
        f"±{100 * step.spread:.1f} %",
        interval if step.inside is not False else f"{interval}, outside",
        ", ".join(map(_term, each.terms)),
        "-" if each.layers is None else percent(100 * each.layers.error),
        "-" if each.peak is None else f"{size(each.peak.measured)} {percent(100 * each.peak.error)}",
    )


def _term(value: Value) -> str:
    name = NAMES.get(value.name, value.name)
    return f"{name} {percent(100 * value.error)}" + ("" if value.inside is not False else "*")


def bar_cells(bar: Bar) -> tuple[str, ...]:
    """One bar, in the order of BAR_COLUMNS."""
    return bar.name, bar.found, bar.asked, {True: "met", False: "MISSED", None: "not judged"}[bar.met]


def markdown(found: Sequence[Result], judged: Sequence[Bar]) -> str:
    """Both tables."""
    tables = (BAR_COLUMNS, [*map(bar_cells, judged)]), (COLUMNS, [*map(cells, found)])
    return "\n".join(markdown_table(columns, rows) for columns, rows in tables)
