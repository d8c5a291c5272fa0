"""Figures of many points, for the dashboard. They need plotly: import this where it is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from piper_hpc.report.figures import ACCENT, INK, MUTED, blank
from piper_hpc.report.points import PointRow

FAILED = "#b4442e"
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def name_of(row: PointRow) -> str:
    """A point in the words of its axes."""
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in row.axes.items()]
    return f"{row.index}: {' '.join(words)}" if words else str(row.run_id)


def predicted_against_measured(rows: Sequence[PointRow]) -> go.Figure | None:
    """Step times, seconds, both axes logarithmic; the line is where prediction and measurement agree."""
    known = [row for row in rows if row.step_s and row.predicted_step_s]
    if not known:
        return None
    figure = blank(380, "measured step", "predicted step")
    times = [time for row in known for time in (row.step_s or 0.0, row.predicted_step_s or 0.0)]
    ends = [0.85 * min(times), 1.18 * max(times)]
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": MUTED, "width": 1, "dash": "dot"}, hoverinfo="skip")
    figure.add_scatter(
        x=[row.step_s for row in known],
        y=[row.predicted_step_s for row in known],
        mode="markers",
        marker={"color": ACCENT, "size": 9, "opacity": 0.75},
        text=[f"{name_of(row)}<br>{row.error_pct:+.1f} %" for row in known],
        hovertemplate="%{text}<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    few = max(ends) / min(ends) < 30  # a decade's ticks alone would leave such an axis without any
    ticks: dict[str, Any] = {"tickformat": "~s", "ticksuffix": "s"} | ({"nticks": 6} if few else {"dtick": 1})
    for axis in (figure.update_xaxes, figure.update_yaxes):
        axis(type="log", **ticks)
    return figure


def rate_over_axis(rows: Sequence[PointRow], axis: str) -> go.Figure | None:
    """Tokens a second of every measured point over one axis, each value a category where they are not all numbers."""
    known = [row for row in rows if row.tokens_per_s]
    if not known:
        return None
    figure = blank(300, axis, "tokens/s")
    values = [row.axes.get(axis) for row in known]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    figure.add_scatter(
        x=values if numbers else [str(value) for value in values],
        y=[row.tokens_per_s for row in known],
        mode="markers",
        marker={"color": ACCENT, "size": 9, "opacity": 0.65},
        text=[name_of(row) for row in known],
        hovertemplate="%{text}<br>%{y:,.0f} tokens/s<extra></extra>",
    )
    if numbers and len(set(values)) <= 12:
        figure.update_xaxes(tickvals=list(set(values)))
    figure.update_yaxes(rangemode="tozero", tickformat="~s")
    figure.update_layout(showlegend=False)
    return figure


def memory(rows: Sequence[PointRow], most: int = 60) -> go.Figure | None:
    """The fullest rank of every point, predicted and measured, against what a rank has; of many the fullest."""
    known = [row for row in rows if row.peak_bytes or row.predicted_peak_bytes]
    known = sorted(known, key=lambda row: -max(row.peak_bytes or 0, row.predicted_peak_bytes or 0))[:most]
    if not known:
        return None
    known.sort(key=lambda row: row.index)
    highest = max(max(row.peak_bytes or 0, row.predicted_peak_bytes or 0) for row in known)
    unit, scale = next(((unit, scale) for scale, unit in UNITS if highest >= scale), ("B", 1))
    figure = blank(320, "point", f"{unit} of the fullest rank")
    kinds: list[tuple[str, str, list[Any]]] = [
        ("predicted", "#c9d3dc", [row.predicted_peak_bytes for row in known]),
        ("measured", ACCENT, [row.peak_bytes for row in known]),
    ]
    for name, colour, sizes in kinds:
        figure.add_bar(
            x=[str(row.index) for row in known],
            y=[None if size is None else size / scale for size in sizes],
            name=name,
            marker={"color": colour},
            text=[name_of(row) for row in known],
            textposition="none",
            hovertemplate=f"%{{text}}<br>%{{y:.3g}} {unit} {name}<extra></extra>",
        )
    # A limit far above all bars would make them lines.
    limits = sorted({row.limit_bytes for row in known if row.limit_bytes and row.limit_bytes < 5 * highest})
    for limit in limits:
        figure.add_hline(
            y=limit / scale,
            line={"color": FAILED, "width": 1.2, "dash": "dot"},
            annotation={"text": f"limit {limit / scale:,.3g} {unit}", "font": {"color": FAILED, "size": 12}},
        )
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.12, "font": {"size": 12, "color": INK}})
    figure.update_xaxes(type="category", nticks=20)
    return figure
