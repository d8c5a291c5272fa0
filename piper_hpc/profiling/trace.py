"""Spans of many ranks as one Chrome trace, which Perfetto and chrome://tracing show with one row per rank."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from piper_hpc.profiling.spans import Span

DIRECTIONS = ("forward", "backward", "everyone")


def gather_spans(spans: Sequence[Span], offset_s: float) -> dict[int, list[Span]] | None:
    """Spans of all ranks on rank 0's clock, on rank 0; None on the others. Collective.

    offset_s: what brings this rank's clock to rank 0's (`profiling.clock.clock_offset_s`).
    """
    mine = [replace(span, start_s=span.start_s + offset_s, end_s=span.end_s + offset_s) for span in spans]
    if not dist.is_initialized():
        return {0: mine}
    received: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, received)
    return None if received is None else dict(enumerate(received))


def trace_events(spans_by_rank: Mapping[int, Sequence[Span]]) -> list[dict[str, Any]]:
    """Complete events ("X") in microseconds since the first span: a thread row per rank, backward as a category.

    Format: the Trace Event Format of Chrome. Spans nest, so a region lies on top of the one that encloses it.
    """
    origin_s = min((span.start_s for spans in spans_by_rank.values() for span in spans), default=0.0)
    names = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted(spans_by_rank)
    ]
    return names + [_event(span, rank, origin_s) for rank in sorted(spans_by_rank) for span in spans_by_rank[rank]]


def write_trace(path: Path, spans_by_rank: Mapping[int, Sequence[Span]]) -> None:
    """Write `trace_events` as one JSON document; it appears under its name only when it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(spans_by_rank)}
    partial.write_text(json.dumps(document))
    os.replace(partial, path)


def _event(span: Span, rank: int, origin_s: float) -> dict[str, Any]:
    event: dict[str, Any] = {
        "name": span.name,
        "cat": "backward" if span.backward else "forward",
        "ph": "X",
        "pid": 0,
        "tid": rank,
        "ts": (span.start_s - origin_s) * 1e6,
        "dur": (span.end_s - span.start_s) * 1e6,
    }
    if span.message is not None:
        event["args"] = {"message": DIRECTIONS[span.message.kind], "micro_batch": span.message.micro_batch}
    return event
