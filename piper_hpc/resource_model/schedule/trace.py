"""A timeline as a Chrome trace, to be opened in Perfetto (https://ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from piper_hpc.resource_model.schedule.timeline import Timeline
from piper_hpc.spec.orders import Action

MICROSECONDS = 1e6
"""The format counts time in microseconds."""


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """Trace-event JSON with one process per rank, whose events fill the step without a gap.

    Actions are named by kind, micro-batch and chunk (`F3 c1`, an overlapped pair `F3 c1 + B1 c0`); `bubble` is waiting
    for a sender or for the other ranks at the end, `p2p` waiting for a transfer.
    """
    events: list[dict[str, Any]] = []
    for rank, timed_actions in enumerate(timeline.timed_actions):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        now = 0.0
        for timed in timed_actions:
            transfer = timed.start_s - timed.p2p_s
            events += _event(rank, "bubble", "bubble", now, transfer)
            events += _event(rank, "p2p", "p2p", transfer, timed.start_s)
            events += _event(rank, _name(timed.action), timed.kind, timed.start_s, timed.end_s)
            now = timed.end_s
        events += _event(rank, "bubble", "bubble", now, timeline.step_s)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_chrome_trace(timeline: Timeline, path: Path) -> None:
    """Write `chrome_trace` to a file."""
    path.write_text(json.dumps(chrome_trace(timeline)), encoding="utf-8")


def _event(rank: int, name: str, category: str, start_s: float, end_s: float) -> list[dict[str, Any]]:
    """One complete event, or none where it would last no time."""
    if end_s <= start_s:
        return []
    times = {"ts": start_s * MICROSECONDS, "dur": (end_s - start_s) * MICROSECONDS}
    return [{"ph": "X", "name": name, "cat": category, "pid": rank, "tid": 0, **times}]


def _name(action: Action) -> str:
    return " + ".join(f"{part.kind}{part.micro_batch} c{part.chunk}" for part in action.parts)
