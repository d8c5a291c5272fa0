"""Predicted against measured, term by term: the rows behind every table, check and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from rich.table import Table

from piper_hpc.report.load import TERMS_OF_LATER_VERSIONS, metrics, steady, timed, typical
from piper_hpc.report.load import Row as Metrics
from piper_hpc.report.units import percent, quantity
from piper_hpc.runs import RunFolder
from piper_hpc.spec import TERMS

NAMES = {
    "attention_s": "attention",
    "router_s": "router",
    "expert_s": "expert",
    "dispatch_s": "dispatch",
    "combine_s": "combine",
    "weight_grad_s": "weight gradients",
    "head_s": "head",
    "p2p_s": "p2p",
    "bubble_s": "bubble",
    "grad_reduce_s": "gradient reduction",
    "optimizer_s": "optimizer",
    "host_s": "host",
    "other_s": "other",
    "step_time_s": "step time",
    "wall_s": "wall clock",
    "peak_memory_bytes": "peak memory",
}
NOT_APPLICABLE = "not applicable"
NOT_PREDICTED = "not predicted"


@dataclass(frozen=True)
class Row:
    """One quantity of a step, in `unit` (s or bytes), on the critical stage.

    error_pct: 100 (predicted - measured) / measured; None where nothing is predicted: no prediction, a bubble that is
    not applicable, the wall clock, and `other_s`, which is what no term explains. share: measured part of the measured
    step, 0...1, of terms only. low, high: the 90 % interval, and covered whether the measured value lies in it.
    """

    key: str
    name: str
    unit: str
    predicted: float | None
    measured: float
    error_pct: float | None
    share: float | None
    low: float | None = None
    high: float | None = None
    covered: bool | None = None
    note: str = ""


def predicted_against_measured(run: RunFolder) -> list[Row]:
    """Step time and peak memory of a run, before them every term where steps were timed by term, and between them the
    wall clock from row to row where it was recorded.

    Measured times are medians over the steady steps, each quantity on its own, so that terms add up to the step time
    only nearly; the peak of memory is the largest over all steps and ranks.
    """
    rows = metrics(run)
    return _rows(rows, steady(rows), run.prediction())


def _rows(rows: Sequence[Metrics], steady_rows: Sequence[Metrics], prediction: dict[str, Any] | None) -> list[Row]:
    step_time_s = typical(steady_rows, "step_time_s")
    shown = TERMS if timed(steady_rows) else ()
    terms = [_row(term, typical(steady_rows, term), prediction, step_time_s) for term in shown]
    peak = max(size for row in rows for size in row["peak_memory_bytes"])
    return [
        *terms,
        _row("step_time_s", step_time_s, prediction, None),
        *([_row("wall_s", typical(steady_rows, "wall_s"), prediction, None)] if "wall_s" in rows[0] else []),
        _row("peak_memory_bytes", float(peak), prediction, None),
    ]


@dataclass(frozen=True)
class MeasuredRouting:
    """A run against what is predicted with its own routing: the model's error without that of the assumed routing.

    imbalance: rows of the busiest rank of an expert group over the mean, over layers and steady steps;
    memory_imbalance: that of the step whose memory was measured. rows: as of `predicted_against_measured`,
    without intervals.
    """

    imbalance: float
    memory_imbalance: float
    rows: list[Row]

    @property
    def line(self) -> str:
        """One sentence about both."""
        by_key = {row.key: row for row in self.rows}
        step, memory = by_key["step_time_s"], by_key["peak_memory_bytes"]
        return (
            f"with the routing that was measured (busiest rank {self.imbalance:.2f} of the mean, "
            f"{self.memory_imbalance:.2f} where memory was): "
            f"step time {quantity(step.predicted or 0.0, 's')} ({percent(step.error_pct or 0.0)}), "
            f"peak memory {quantity(memory.predicted or 0.0, 'bytes')} ({percent(memory.error_pct or 0.0)})"
        )


def with_measured_routing(run: RunFolder) -> MeasuredRouting | None:
    """The run against its prediction at the routing that it had; None where either is not recorded.

    The prediction was made before the run at several imbalances; between them each quantity is a straight line.
    """
    prediction, rows = run.prediction(), metrics(run)
    known = ((prediction or {}).get("routing") or {}).get("by_skew")
    if prediction is None or not known or "rank_load" not in rows[0]:
        return None
    steady_rows, imbalances = steady(rows), [one["skew"] for one in known]
    imbalance = fmean(fmean(row["rank_load"]) for row in steady_rows)
    peak = max(size for row in rows for size in row["peak_memory_bytes"])
    memory_imbalance = next(fmean(row["rank_load"]) for row in rows if max(row["peak_memory_bytes"]) == peak)
    at = {
        **prediction,
        "step_time_s": _interpolate(imbalances, imbalance, [one["step_time_s"] for one in known]),
        "terms": {term: _interpolate(imbalances, imbalance, [_terms(one)[term] for one in known]) for term in TERMS},
        "peak_memory_bytes": [
            _interpolate(imbalances, memory_imbalance, [max(one["peak_memory_bytes"]) for one in known])
        ],
        "intervals": {},
    }
    return MeasuredRouting(imbalance, memory_imbalance, _rows(rows, steady_rows, at))


def _interpolate(imbalances: Sequence[float], at: float, values: Sequence[float]) -> float:
    """Linear interpolation at imbalance `at` of `values`, given at ascending `imbalances`; constant beyond the ends."""
    for (low, below), (high, above) in pairwise(zip(imbalances, values, strict=True)):
        if at <= high:
            return below + max(0.0, (at - low) / (high - low)) * (above - below)
    return values[-1]


def _row(key: str, measured: float, prediction: dict[str, Any] | None, step_time_s: float | None) -> Row:
    predicted, note = _predicted(key, prediction)
    error_pct = low = high = None
    if predicted is not None and key != "other_s":
        error_pct = 100 * (predicted - measured) / measured if measured else None
        low, high = (prediction or {})["intervals"].get(key, (None, None))
    return Row(
        key=key,
        name=NAMES[key],
        unit="bytes" if key.endswith("_bytes") else "s",
        predicted=predicted,
        measured=measured,
        error_pct=error_pct,
        share=measured / step_time_s if step_time_s else None,
        low=low,
        high=high,
        covered=low <= measured <= high if low is not None and high is not None else None,
        note=note,
    )


def _predicted(key: str, prediction: dict[str, Any] | None) -> tuple[float | None, str]:
    """The predicted value of a quantity, or None and the reason."""
    if key == "wall_s":
        return None, NOT_PREDICTED
    if prediction is None:
        return None, "no prediction"
    if key == "bubble_s" and prediction["bubble_fraction"] is None:
        return None, NOT_APPLICABLE
    if key == "peak_memory_bytes":
        return float(max(prediction[key])), ""
    return float(prediction[key] if key == "step_time_s" else _terms(prediction)[key]), ""


def _terms(prediction: dict[str, Any]) -> dict[str, float]:
    return TERMS_OF_LATER_VERSIONS | prediction["terms"]


def cells(row: Row) -> tuple[str, str, str, str, str]:
    """A row as text: name, predicted, measured, error, share of the step."""
    return (
        row.name,
        row.note or quantity(row.predicted or 0.0, row.unit),
        quantity(row.measured, row.unit),
        "" if row.error_pct is None else percent(row.error_pct),
        "" if row.share is None else f"{100 * row.share:.1f} %",
    )


COLUMNS = ("", "predicted", "measured", "error", "of step")


def render(rows: Sequence[Row], title: str = "predicted against measured") -> Table:
    """The rows for a terminal."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, justify="right" if column else "left")
    for row in rows:
        if row.key == "step_time_s":
            shown.add_section()
        name, predicted, measured, error, share = cells(row)
        style = "bold" if row.key == "step_time_s" else ""
        shown.add_row(name, f"[dim]{predicted}[/]" if row.note else predicted, measured, error, share, style=style)
    return shown
