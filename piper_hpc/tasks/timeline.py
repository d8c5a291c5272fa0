"""A step's pipeline as it was predicted and as it went, in one trace for Perfetto: two rows a rank, one clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from piper_hpc.profiling.spans import Span
from piper_hpc.resource_model.schedule import Timeline
from piper_hpc.spec.layout import RankPlace

MICROSECONDS = 1e6
PREDICTED, MEASURED = 0, 1
"""Rows of a rank, a process of the trace."""


def aligned(predicted: Timeline, measured: Mapping[RankPlace, Sequence[Span]]) -> dict[str, Any]:
    """Trace-event JSON. measured: the spans of one step on one clock; both begin with the first pass of any rank.

    Passes alone are shown, by kind, micro-batch and chunk (`F3 c1`); a gap is waiting, and what comes after the last
    pass (reduction, optimizer) is not part of a pipeline. A predicted row is that of the rank's pipeline rank.
    """
    passes = {place: [span for span in spans if span.action is not None] for place, spans in measured.items()}
    began_s = min((span.start_s for spans in passes.values() for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for place in sorted(passes, key=lambda place: place.rank):
        name = f"rank {place.rank} (pipeline rank {place.pipeline_rank})"
        events += _label("process_name", place.rank, 0, {"name": name})
        events += _label("process_sort_index", place.rank, 0, {"sort_index": place.rank})
        for row, title in ((PREDICTED, "predicted"), (MEASURED, "measured")):
            events += _label("thread_name", place.rank, row, {"name": title})
        events += _predicted(predicted, place)
        for span in passes[place]:
            assert span.action is not None
            done = span.action
            name = f"{done.kind}{done.micro_batch} c{place.stages.index(done.stage)}"
            events.append(_event(place, MEASURED, name, done.kind, span.start_s - began_s, span.end_s - began_s))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _predicted(timeline: Timeline, place: RankPlace) -> Iterator[dict[str, Any]]:
    """The passes of a pipeline rank; those of an overlapped pair share its time, one after the other."""
    for timed in timeline.timed_actions[place.pipeline_rank]:
        parts = timed.action.parts
        each_s = (timed.end_s - timed.start_s) / len(parts)
        for index, part in enumerate(parts):
            start_s = timed.start_s + index * each_s
            name = f"{part.kind}{part.micro_batch} c{part.chunk}"
            yield _event(place, PREDICTED, name, part.kind, start_s, start_s + each_s)


def _event(place: RankPlace, row: int, name: str, kind: str, start_s: float, end_s: float) -> dict[str, Any]:
    times = {"ts": start_s * MICROSECONDS, "dur": (end_s - start_s) * MICROSECONDS}
    return {"ph": "X", "name": name, "cat": kind, "pid": place.rank, "tid": row, **times}


def _label(kind: str, process: int, thread: int, value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": value}
