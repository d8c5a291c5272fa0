"""The trace of a timeline: valid, complete, and as long as the step on every rank."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from piper_hpc.resource_model.schedule import Timeline, chrome_trace, simulate, write_chrome_trace


@pytest.fixture
def timeline() -> Timeline:
    return simulate(
        "dualpipev",
        2,
        6,
        [1.0, 1.2, 0.9, 1.1],
        [2.0, 2.1, 1.9, 2.2],
        weight_s=[0.8, 0.9, 0.7, 1.0],
        send_forward_s=[0.1] * 3,
        send_backward_s=[0.2] * 3,
        overlap_s=[0.3, 0.3],
    )


def test_every_rank_is_a_process_whose_events_fill_the_step(timeline: Timeline) -> None:
    events = chrome_trace(timeline)["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert names == {0: "rank 0", 1: "rank 1"}
    for rank in range(2):
        spans = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        assert spans[0]["ts"] == 0.0
        for span, following in pairwise(spans):
            assert following["ts"] == pytest.approx(span["ts"] + span["dur"])
        assert sum(span["dur"] for span in spans) == pytest.approx(timeline.step_s * 1e6)
        lasting = {cat: sum(s["dur"] for s in spans if s["cat"] == cat) for cat in ("bubble", "p2p")}
        assert lasting["p2p"] == pytest.approx(timeline.p2p_s[rank] * 1e6)
        at_end = timeline.step_s - timeline.end_s[rank]
        assert lasting["bubble"] == pytest.approx((timeline.bubble_s[rank] + at_end) * 1e6)


def test_slots_carry_their_names(timeline: Timeline) -> None:
    names = [event["name"] for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "X"]
    assert {"F0 c0", "F3 c0 + B1 c1", "bubble", "p2p"} <= set(names)
    assert any(name.startswith("I") for name in names)
    assert any(name.startswith("W") for name in names)


def test_the_file_is_json_that_a_viewer_takes(timeline: Timeline, tmp_path: Path) -> None:
    write_chrome_trace(timeline, tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace == json.loads(json.dumps(chrome_trace(timeline)))
    for event in trace["traceEvents"]:
        assert event["ph"] in ("X", "M")
        assert {"name", "pid", "tid"} <= event.keys()
        if event["ph"] == "X":
            assert event["dur"] > 0.0
            assert event["ts"] >= 0.0
