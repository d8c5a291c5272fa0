"""Spans of many ranks as one Chrome trace, which Perfetto and chrome://tracing show with one row per rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from piper_hpc.profiling.spans import Span
from piper_hpc.spec.layout import RankPlace

MESSAGES = ("activations", "gradients", "everyone")


def trace_events(spans: Mapping[RankPlace, Sequence[Span]]) -> list[dict[str, Any]]:
    """Events in microseconds since the first span: a process row per node, a thread row per rank.

    Spans are on one clock. Format: the Trace Event Format of Chrome; backward regions are a category of their own.
    """
    origin_s = min((span.start_s for each in spans.values() for span in each), default=0.0)
    places = sorted(spans, key=lambda place: place.rank)
    rows = [_label("process_name", node, 0, f"node {node}") for node in sorted({place.node for place in places})]
    for place in places:
        stages = " and ".join(map(str, place.stages))
        name = f"rank {place.rank}: stage {stages}, replica {place.replica}, expert shard {place.shard}"
        rows.append(_label("thread_name", place.node, place.rank, name))
    return rows + [_event(span, place, origin_s) for place in places for span in spans[place]]


def write_trace(path: Path, spans: Mapping[RankPlace, Sequence[Span]]) -> None:
    """Write `trace_events` as one JSON document, see `write_document`."""
    write_document(path, {"displayTimeUnit": "ms", "traceEvents": trace_events(spans)})


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write a trace; it appears under its name only when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(document), encoding="utf-8")
    os.replace(partial, path)


def _label(kind: str, node: int, rank: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": node, "tid": rank, "args": {"name": name}}


def _event(span: Span, place: RankPlace, origin_s: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "name": span.name,
        "cat": "backward" if span.backward else "forward",
        "ph": "X",
        "pid": place.node,
        "tid": place.rank,
        "ts": (span.start_s - origin_s) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
    }
    if span.message is not None:
        about = {"stage": span.message.stage, "micro_batch": span.message.micro_batch}
        event["args"] = {"for": MESSAGES[span.message.kind]} | about
    if span.action is not None:
        event["args"] = {
            "action": span.action.kind,
            "stage": span.action.stage,
            "micro_batch": span.action.micro_batch,
        }
    return event
