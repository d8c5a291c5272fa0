"""Figures of a run, for the report. They need plotly, of the optional extra `report`: import this where it is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from piper_hpc.report.load import Row as MetricsRow
from piper_hpc.report.load import steady, typical
from piper_hpc.report.table import NAMES, Row
from piper_hpc.report.units import seconds
from piper_hpc.spec import TERMS

INK, MUTED, GRID, ACCENT = "#1c2733", "#66727f", "#e6eaee", "#1f5fa8"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# One hue for each kind of work: blue computes, amber communicates, green is the host, grey waits.
COLOURS = {
    "attention_s": "#1f5fa8",
    "router_s": "#9dc3ea",
    "expert_s": "#4a8fd6",
    "weight_grad_s": "#6f7fc9",
    "head_s": "#163f70",
    "dispatch_s": "#e08a1e",
    "combine_s": "#f2b866",
    "p2p_s": "#b5620c",
    "grad_reduce_s": "#8a4a08",
    "optimizer_s": "#2f8f6b",
    "host_s": "#8cc9b0",
    "bubble_s": "#b8c0c8",
    "other_s": "#dde2e7",
}
STACK = tuple(COLOURS)
assert set(STACK) == set(TERMS), "every term has a colour"


def blank(height: int, x_title: str, y_title: str) -> go.Figure:
    """An empty figure in the report's style."""
    figure = go.Figure()
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "tickcolor": GRID, "automargin": True}
    figure.update_layout(
        height=height,
        margin={"l": 12, "r": 16, "t": 12, "b": 12},
        paper_bgcolor="white",
        plot_bgcolor="white",
        font={"family": FONT, "size": 13, "color": INK},
        xaxis={"title": {"text": x_title, "font": {"color": MUTED, "size": 13}}, **axis},
        yaxis={"title": {"text": y_title, "font": {"color": MUTED, "size": 13}}, **axis},
        hoverlabel={"bgcolor": "white", "bordercolor": GRID, "font": {"family": FONT, "color": INK}},
        legend={"traceorder": "normal", "font": {"size": 12}},
    )
    return figure


def loss_curve(rows: Sequence[MetricsRow], vocabulary: int | None) -> go.Figure:
    """Loss (nats a token) over steps, beside that of guessing every token alike, ln(vocabulary), where it is known."""
    figure = blank(320, "step", "loss, nats per token")
    figure.add_scatter(
        x=[row["step"] for row in rows],
        y=[row["loss"] for row in rows],
        mode="lines",
        line={"color": ACCENT, "width": 2.2},
        hovertemplate="step %{x}<br>loss %{y:.4f}<extra></extra>",
    )
    if vocabulary is not None:
        figure.add_hline(
            y=math.log(vocabulary),
            line={"color": MUTED, "width": 1, "dash": "dot"},
            annotation={"text": f"uniform guess, ln {vocabulary}", "font": {"color": MUTED, "size": 12}},
            annotation_position="bottom right",
        )
    figure.update_yaxes(rangemode="tozero")
    return figure


def throughput(rows: Sequence[MetricsRow]) -> go.Figure:
    """Tokens a second over steps, with the steady median."""
    figure = blank(320, "step", "tokens per second")
    figure.add_scatter(
        x=[row["step"] for row in rows],
        y=[row["tokens_per_s"] for row in rows],
        mode="lines",
        line={"color": ACCENT, "width": 1.6},
        hovertemplate="step %{x}<br>%{y:,.0f} tokens/s<extra></extra>",
    )
    figure.add_hline(y=typical(steady(rows), "tokens_per_s"), line={"color": MUTED, "width": 1, "dash": "dot"})
    figure.update_yaxes(rangemode="tozero", tickformat="~s")
    return figure


def breakdown(rows: Sequence[MetricsRow]) -> go.Figure:
    """Where each step went on its critical stage: every term, stacked, in milliseconds."""
    figure = blank(400, "step", "step time by term, ms")
    for term in STACK:
        figure.add_bar(
            x=[row["step"] for row in rows],
            y=[1e3 * row[term] for row in rows],
            name=NAMES[term],
            marker={"color": COLOURS[term], "line": {"width": 0}},
            hovertemplate="step %{x}<br>%{y:.3g} ms<extra>" + NAMES[term] + "</extra>",
        )
    # First steps hold what happens once: such steps run out of the picture, so that the others can be read.
    times = sorted(row["step_time_s"] for row in steady(rows))
    long = times[round(0.95 * (len(times) - 1))]
    figure.update_layout(barmode="stack", bargap=0.08, yaxis_range=[0, 1.25e3 * long])
    return figure


def stages(rows: Sequence[MetricsRow]) -> go.Figure:
    """Where a step goes on each pipeline stage: the median of every term over the steady steps, stacked."""
    steady_rows = steady(rows)
    names = [f"stage {stage}" for stage in range(len(steady_rows[0]["stages"]))]
    figure = blank(110 + 44 * len(names), "median time of a step, ms", "")
    for term in STACK:
        medians = [typical([row["stages"][stage] for row in steady_rows], term) for stage in range(len(names))]
        figure.add_bar(
            y=names,
            x=[1e3 * value for value in medians],
            name=NAMES[term],
            orientation="h",
            marker={"color": COLOURS[term], "line": {"width": 0}},
            hovertemplate="%{y}<br>%{x:.3g} ms<extra>" + NAMES[term] + "</extra>",
            showlegend=False,
        )
    figure.update_layout(barmode="stack", bargap=0.3)
    figure.update_yaxes(autorange="reversed", ticksuffix="  ")
    return figure


def predicted_against_measured(table: Sequence[Row]) -> go.Figure:
    """Measured terms as bars, predicted ones as marks with their 90 % interval."""
    terms = [row for row in table if row.key in TERMS]
    names = [row.name for row in terms]
    figure = blank(90 + 32 * len(terms), "median time of a step, ms", "")
    figure.add_bar(
        y=names,
        x=[1e3 * row.measured for row in terms],
        orientation="h",
        name="measured",
        marker={"color": [COLOURS[row.key] for row in terms], "line": {"width": 0}},
        customdata=[seconds(row.measured) for row in terms],
        hovertemplate="%{y}<br>measured %{customdata}<extra></extra>",
        showlegend=False,
    )
    known = [row for row in terms if row.predicted is not None]
    figure.add_scatter(
        y=[row.name for row in known],
        x=[1e3 * (row.predicted or 0.0) for row in known],
        mode="markers",
        name="predicted, with 90 % interval",
        marker={"symbol": "diamond", "size": 10, "color": "white", "line": {"color": INK, "width": 1.8}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [_beyond(row, row.high, 1) for row in known],
            "arrayminus": [_beyond(row, row.low, -1) for row in known],
            "color": INK,
            "thickness": 1.2,
            "width": 4,
        },
        customdata=[seconds(row.predicted or 0.0) for row in known],
        hovertemplate="%{y}<br>predicted %{customdata}<extra></extra>",
    )
    figure.update_layout(bargap=0.35, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(autorange="reversed", ticksuffix="  ", showgrid=False)
    return figure


def _beyond(row: Row, end: float | None, sign: int) -> float:
    """Milliseconds from a prediction to one end of its interval."""
    return 0.0 if end is None or row.predicted is None else max(0.0, sign * 1e3 * (end - row.predicted))


def expert_load(rows: Sequence[MetricsRow]) -> go.Figure:
    """Tokens of the busiest expert over the mean expert's, by layer and step; 1 is perfectly balanced."""
    layers = len(rows[0]["expert_load"])
    figure = blank(max(200, 120 + 26 * layers), "step", "layer")
    figure.add_heatmap(
        x=[row["step"] for row in rows],
        y=list(range(layers)),
        z=[[row["expert_load"][layer] for row in rows] for layer in range(layers)],
        zmin=1.0,
        colorscale=[[0, "#f3f7fb"], [0.5, "#7fb0e0"], [1, "#163f70"]],
        colorbar={"title": {"text": "busiest / mean", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="step %{x}, layer %{y}<br>busiest expert %{z:.2f} x mean<extra></extra>",
    )
    figure.update_yaxes(autorange="reversed", dtick=max(1, layers // 12))
    return figure


MOST_LINES = 1024
"""Experts that a heat map shows at most, of evenly spread layers: more are finer than its pixels."""


def experts_over_time(rows: Sequence[MetricsRow], moved: Sequence[MetricsRow]) -> go.Figure:
    """Load of every expert over the mean's, layer by layer, at the steps that were kept; moves are marked above."""
    kept = [row for row in rows if "routed" in row]
    every, experts = len(kept[0]["routed"]), len(kept[0]["routed"][0])
    layers = range(0, every, -(-every * experts // MOST_LINES))
    lines = [(layer, expert) for layer in layers for expert in range(experts)]
    figure = blank(max(320, 140 + 2 * len(lines)), "step", "layer")
    figure.add_heatmap(
        x=[row["step"] for row in kept],
        y=list(range(len(lines))),
        z=[[_over_mean(row["routed"][layer], expert) for row in kept] for layer, expert in lines],
        customdata=[[f"layer {layer}, expert {expert}"] * len(kept) for layer, expert in lines],
        zmin=0.0,
        colorscale=[[0, "#ffffff"], [0.35, "#cfe1f3"], [0.7, "#7fb0e0"], [1, "#163f70"]],
        colorbar={"title": {"text": "load / mean", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="step %{x}, %{customdata}<br>%{z:.2f} x mean<extra></extra>",
    )
    _mark(figure, moved)
    figure.update_yaxes(
        autorange="reversed",
        tickvals=[index * experts for index in range(len(layers))],
        ticktext=list(map(str, layers)),
    )
    return figure


def _over_mean(counts: Sequence[int], expert: int) -> float:
    return counts[expert] * len(counts) / max(1, sum(counts))


def rank_load(rows: Sequence[MetricsRow], moved: Sequence[MetricsRow]) -> go.Figure:
    """Rows of the busiest rank over the mean's, of the mean and of the worst layer, over steps; moves are marked."""
    figure = blank(320, "step", "busiest rank / mean")
    for name, value, width in (("worst layer", max, 1.2), ("mean of layers", _mean, 2.2)):
        figure.add_scatter(
            x=[row["step"] for row in rows],
            y=[value(row["rank_load"]) for row in rows],
            mode="lines",
            name=name,
            line={"color": ACCENT, "width": width},
            hovertemplate="step %{x}<br>%{y:.2f}<extra>" + name + "</extra>",
        )
    _mark(figure, moved)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mark(figure: go.Figure, moved: Sequence[MetricsRow]) -> None:
    """A dotted line after each step at whose end experts moved."""
    for row in moved:
        figure.add_vline(
            x=row["step"] + 0.5,
            line={"color": COLOURS["dispatch_s"], "width": 1.6, "dash": "dot"},
            annotation={"text": f"{row['migration']['moved']} moved", "font": {"color": MUTED, "size": 11}},
        )


def html(figures: dict[str, Any]) -> dict[str, str]:
    """Each figure as an HTML fragment; the first carries plotly itself, so that the page works offline."""
    fragments: dict[str, str] = {}
    for name, figure in figures.items():
        fragments[name] = figure.to_html(
            full_html=False,
            include_plotlyjs=not fragments,
            div_id=f"figure-{name}",
            config={"displaylogo": False, "responsive": True, "displayModeBar": False},
        )
    return fragments
