"""Predicted and measured pipeline in one trace: the same passes under the same names, from one start."""

from __future__ import annotations

import pytest

from piper_hpc.profiling.spans import Pass, Span
from piper_hpc.resource_model.schedule import Timeline, simulate
from piper_hpc.spec import Layout, RankMap
from piper_hpc.spec.layout import RankPlace
from piper_hpc.tasks.timeline import MEASURED, PREDICTED, aligned

LATE_S = 1000.0
"""When the measured step began, on its clock."""


def spans_of(predicted: Timeline, place: RankPlace, slow: float) -> list[Span]:
    """Passes that take `slow` times what is predicted, one part of a pair after the other, and what is no pass."""
    spans = [Span("other", LATE_S - 5, LATE_S + 50)]
    for timed in predicted.timed_actions[place.pipeline_rank]:
        parts = timed.action.parts
        each_s = (timed.end_s - timed.start_s) / len(parts)
        for index, part in enumerate(parts):
            start_s = LATE_S + slow * (timed.start_s + index * each_s)
            about = Pass(part.kind, place.stages[part.chunk], part.micro_batch)
            spans.append(Span("pass", start_s, start_s + slow * each_s, action=about))
    return spans


@pytest.mark.parametrize(("schedule", "vpp"), [("1f1b", 1), ("zbv", 2), ("dualpipev", 2)])
def test_both_rows_of_a_rank_have_the_same_passes_from_one_start(schedule: str, vpp: int) -> None:
    layout = Layout(pp=2, dp=2, vpp=vpp, schedule=schedule, micro_batch=1)
    places = RankMap.block(layout, 4, (0,)).places
    stages = layout.pp * vpp
    predicted = simulate(schedule, 2, 4, [1.0] * stages, [2.0] * stages, weight_s=[1.0] * stages)
    events = aligned(predicted, {place: spans_of(predicted, place, 3.0) for place in places})["traceEvents"]
    passes = [event for event in events if event["ph"] == "X"]
    for place in places:
        rows = {
            row: {event["name"]: event for event in passes if (event["pid"], event["tid"]) == (place.rank, row)}
            for row in (PREDICTED, MEASURED)
        }
        assert rows[PREDICTED].keys() == rows[MEASURED].keys() and len(rows[MEASURED]) >= 2 * 4 * vpp
        for name, event in rows[MEASURED].items():
            assert event["ts"] == pytest.approx(3.0 * rows[PREDICTED][name]["ts"])
            assert event["dur"] == pytest.approx(3.0 * rows[PREDICTED][name]["dur"])
            assert event["cat"] == name[0]
    assert min(event["ts"] for event in passes) == 0.0
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"predicted", "measured"}
