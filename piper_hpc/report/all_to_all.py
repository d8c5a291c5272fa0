"""Dispatch and combine of a run: bytes of rows by level, counted from plans and as predicted, and exposed seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from piper_hpc.report.load import Row as MetricsRow
from piper_hpc.report.load import steady
from piper_hpc.report.units import percent, seconds, size
from piper_hpc.spec import LEVELS

NAMES = {"node": "inside nodes", "rack": "between nodes of a rack", "system": "between racks"}
COLUMNS = ("rows of a step sent", "predicted", "counted", "error")


@dataclass(frozen=True)
class Level:
    """Payload bytes of one step, all ranks, over links of one level; predicted is None where nothing was."""

    name: str
    predicted: float | None
    counted: float

    @property
    def error_pct(self) -> float | None:
        """100 (predicted - counted) / counted; None without either."""
        if self.predicted is None or not self.counted:
            return None
        return 100 * (self.predicted - self.counted) / self.counted

    def cells(self) -> tuple[str, str, str, str]:
        """As text."""
        predicted = "no prediction" if self.predicted is None else size(self.predicted)
        return self.name, predicted, size(self.counted), "" if self.error_pct is None else percent(self.error_pct)


def levels(rows: Sequence[MetricsRow], prediction: dict[str, Any] | None) -> list[Level]:
    """Each level that rows crossed, medians over the steady steps; none where no row left its rank."""
    steady_rows = [row["exchange"]["payload_bytes"] for row in steady(rows) if "exchange" in row]
    predicted = ((prediction or {}).get("exchange") or {}).get("payload_bytes")
    found = [
        Level(
            NAMES[level], None if predicted is None else predicted[level], median(sent[level] for sent in steady_rows)
        )
        for level in LEVELS
        if steady_rows
    ]
    return [level for level in found if level.counted]


def line(rows: Sequence[MetricsRow]) -> str:
    """How long dispatch and combine keep a step; empty where the run did not record it, or was not timed."""
    shown = [
        (row["exchange"]["exposed_s"], row["step_time_s"])
        for row in steady(rows)
        if "exposed_s" in row.get("exchange", {})
    ]
    if not shown:
        return ""
    exposed, step = (median(values) for values in zip(*shown, strict=True))
    return f"Dispatch and combine keep the critical stage {seconds(exposed)} of a step of {seconds(step)}."
