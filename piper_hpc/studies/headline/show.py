"""Tables of a comparison, for the terminal and as Markdown, and its curve as a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from piper_hpc.report.units import percent, seconds, size
from piper_hpc.spec import Layout
from piper_hpc.studies.headline.judge import CROSSINGS, PAIRS, Bar, Entry, Point, crossing
from piper_hpc.studies.headline.strategies import FLAT, STRATEGIES
from piper_hpc.studies.tables import markdown_table, table

ENTRY_COLUMNS = (
    *("links", "strategy", "layout", "step", "repeats differ by", "predicted", "over flat", "predicted over flat"),
    *("in exchange", "bubble", "wire", "exchange CPU", "memory"),
)
CURVE_COLUMNS = ("links", "flat in exchange", "as trained", "rho", "ceiling C", *(f"{a}/{b}" for a, b in PAIRS))
BAR_COLUMNS = ("bar", "found", "asked", "")


def layout_name(layout: Layout, all_to_all: str) -> str:
    """Degrees and what else is not the default."""
    parts = [f"pp{layout.pp}", f"ep{layout.ep}", f"dp{layout.dp}", f"mb{layout.micro_batch}"]
    parts += [layout.schedule] * (layout.pp > 1) + [f"vpp{layout.vpp}"] * (layout.vpp > 1)
    parts += [all_to_all] * (layout.ep > 1) + [f"zero{layout.zero}"] * bool(layout.zero)
    parts += [layout.recompute] * (layout.recompute != "none")
    return " ".join([*parts, *["stages " + "+".join(map(str, layout.stage_layers))] * bool(layout.stage_layers)])


def entry_cells(point: Point, entry: Entry) -> tuple[str, ...]:
    """One strategy at one point, in the order of ENTRY_COLUMNS."""
    pair = (entry.strategy, FLAT)
    spread = (max(entry.steps_s) - min(entry.steps_s)) / 2 / entry.step_s
    return (
        f"/ {point.slowdown:g}",
        f"{entry.strategy} {STRATEGIES[entry.strategy].name}",
        layout_name(entry.layout, entry.all_to_all),
        seconds(entry.step_s),
        f"±{100 * spread:.1f} %",
        f"{seconds(entry.predicted_s)} {percent(100 * (entry.predicted_s / entry.step_s - 1))}",
        _ratio(point.faster(pair)),
        _ratio(point.predicted_faster(pair)),
        f"{100 * entry.share:.0f} %",
        f"{100 * entry.bubble:.0f} %",
        seconds(entry.wire_s),
        "-" if entry.cpu_s is None else seconds(entry.cpu_s),
        size(entry.peak_bytes),
    )


def curve_cells(point: Point) -> tuple[str, ...]:
    """One point, in the order of CURVE_COLUMNS; ratios as measured, as predicted, and with the router's own routing."""
    flat = point.entries.get(FLAT)
    return (
        f"/ {point.slowdown:g}",
        "-" if flat is None else f"{100 * flat.share:.0f} %",
        "-" if flat is None else f"{100 * flat.trained_share:.0f} %",
        f"{point.left:.3f}",
        _ratio(point.ceiling),
        *(
            f"{_ratio(point.faster(pair))} ({_ratio(point.predicted_faster(pair))}, "
            f"{_ratio(point.trained_faster(pair))})"
            for pair in PAIRS
        ),
    )


def crossing_lines(points: Sequence[Point]) -> list[str]:
    """Where each pair passes the levels of the claim."""
    lines = []
    for pair in PAIRS[:3]:
        for level in CROSSINGS:
            measured, predicted = (crossing(points, pair, level, predicted=which) for which in (False, True))
            at = [("not reached" if found is None else f"links / {found:.2g}") for found in (measured, predicted)]
            lines.append(f"{pair[0]}/{pair[1]} reaches {level:g}: measured {at[0]}, predicted {at[1]}")
    return lines


def bar_cells(bar: Bar) -> tuple[str, ...]:
    """One bar, in the order of BAR_COLUMNS."""
    return bar.name, bar.found, bar.asked, "met" if bar.met else "MISSED"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _tables(points: Sequence[Point], judged: Sequence[Bar]) -> list[tuple[Sequence[str], list[tuple[str, ...]]]]:
    return [
        (CURVE_COLUMNS, [*map(curve_cells, points)]),
        (ENTRY_COLUMNS, [entry_cells(point, entry) for point in points for entry in point.entries.values()]),
        (BAR_COLUMNS, [*map(bar_cells, judged)]),
    ]


def printed(points: Sequence[Point], judged: Sequence[Bar]) -> None:
    """All tables at the terminal."""
    console = Console() if sys.stdout.isatty() else Console(width=200)
    for columns, rows in _tables(points, judged):
        console.print(table(columns, rows), "")
    console.print(*crossing_lines(points), sep="\n")


def markdown(points: Sequence[Point], judged: Sequence[Bar]) -> str:
    """All tables."""
    lines = [f"- {each.key}: {each.name}; {each.stands_for}" for each in STRATEGIES.values()]
    lines += ["", *(f"- {line}" for line in crossing_lines(points)), ""]
    lines += [markdown_table(columns, rows) for columns, rows in _tables(points, judged)]
    return "\n".join(lines)
