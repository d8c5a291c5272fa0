"""When a run will end: from its last measured steps, before the first from its prediction, and from Slurm's start."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piper_hpc.submit.scheduler import JobState

LAST_ROWS = 20
"""How many of the last steps are averaged: enough that a checkpoint or a report among them weighs what it costs."""


@dataclass(frozen=True)
class Eta:
    """Seconds from now to the end of a run, and whether its step time was `measured` or `predicted`."""

    seconds: float
    source: str

    def __str__(self) -> str:
        return span(self.seconds) if self.source == "measured" else f"~{span(self.seconds)}"


def measured_step_s(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean wall-clock seconds of the newest attempt's last steps, without its warm-up where it has others."""
    newest = [row for row in rows if row.get("attempt") == rows[-1].get("attempt")]
    steady = [row for row in newest if not row.get("warmup")]
    # The wall clock of the first step is from the start of the attempt.
    found = [row.get("wall_s", row.get("step_time_s")) for row in steady] or [row.get("step_time_s") for row in newest]
    times = [time_s for time_s in found[-LAST_ROWS:] if _is_time(time_s)]
    return sum(times) / len(times) if times else None


def eta(
    state: str | None,
    steps_left: int | None,
    rows: Sequence[Mapping[str, Any]],
    prediction: Mapping[str, Any],
    said: JobState | None,
    now_s: float,
) -> Eta | None:
    """Of a run that runs, or that waits and has an expected start; None where that is not known.

    rows: of metrics.jsonl; prediction: prediction.json, or empty; said: what Slurm says of the job; now_s: Unix.
    """
    starts_s = said.start_s if said is not None else None
    if steps_left is None or state not in ("pending", "running") or (state == "pending" and starts_s is None):
        return None
    step_s, source = measured_step_s(rows) if rows else None, "measured"
    if step_s is None:
        predicted_s = prediction.get("step_time_s")
        step_s, source = predicted_s if _is_time(predicted_s) else None, "predicted"
    if step_s is None:
        return None
    wait_s = max(0.0, starts_s - now_s) if state == "pending" and starts_s is not None else 0.0
    return Eta(wait_s + max(0, steps_left) * step_s, source)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def span(seconds: float) -> str:
    """As people say how long: `45 s`, `12 min`, `2 h 05 min`, `3 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
