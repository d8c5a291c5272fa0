"""The 1F1B timeline: its order, its closed form where that holds, and its accounting everywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.schedule import (
    bubble_fraction,
    closed_form_1f1b,
    in_flight,
    order_1f1b,
    simulate_1f1b,
)

SECONDS = st.floats(1e-3, 10.0)


@given(st.integers(1, 8), st.integers(0, 24), SECONDS, SECONDS)
def test_equal_stages_take_the_closed_form(stages: int, more: int, forward: float, backward: float) -> None:
    micro_batches = stages + more
    timeline = simulate_1f1b([forward] * stages, [backward] * stages, micro_batches)
    step = closed_form_1f1b(forward, backward, stages, micro_batches)
    assert timeline.step_s == pytest.approx(step)
    idle = 1 - micro_batches * (forward + backward) / timeline.step_s
    assert idle == pytest.approx(bubble_fraction(stages, micro_batches), abs=1e-9)


@given(st.data(), st.integers(1, 6), st.integers(1, 12))
def test_a_stage_works_waits_and_does_nothing_else(data: st.DataObject, stages: int, micro_batches: int) -> None:
    times = st.lists(SECONDS, min_size=stages, max_size=stages)
    forward, backward = data.draw(times), data.draw(times)
    down, up = data.draw(times)[1:], data.draw(times)[1:]
    timeline = simulate_1f1b(forward, backward, micro_batches, down, up)
    for stage in range(stages):
        work = micro_batches * (forward[stage] + backward[stage])
        assert timeline.end_s[stage] == pytest.approx(work + timeline.bubble_s[stage] + timeline.p2p_s[stage])
        assert timeline.step_s >= work * (1 - 1e-9)
        kinds = [(slot.kind, slot.micro_batch) for slot in timeline.slots[stage]]
        assert kinds == order_1f1b(stage, stages, micro_batches)
        for slot, following in zip(timeline.slots[stage], timeline.slots[stage][1:], strict=False):
            assert following.start_s >= slot.end_s


@given(st.integers(1, 6), st.integers(1, 12))
def test_never_more_micro_batches_alive_than_memory_counts(stages: int, micro_batches: int) -> None:
    for stage in range(stages):
        alive = peak = 0
        for kind, _ in order_1f1b(stage, stages, micro_batches):
            alive += 1 if kind == "F" else -1
            peak = max(peak, alive)
        assert alive == 0
        assert peak == in_flight(stage, stages, micro_batches)


def test_two_stages_by_hand() -> None:
    # F 1 s, B 2 s, a message 0.5 s each way, two micro-batches; both ends wait for every message.
    #   stage 0: F0 0-1, F1 1-2, waits for the gradient of 0 until 5.0, B0 5-7, gradient of 1 at 8.5, B1 8.5-10.5
    #   stage 1: F0 1.5-2.5, B0 2.5-4.5, F1 5-6, B1 6-8
    timeline = simulate_1f1b([1.0, 1.0], [2.0, 2.0], 2, [0.5], [0.5])
    starts = [[(s.kind, s.micro_batch, s.start_s) for s in stage] for stage in timeline.slots]
    assert starts[0] == [("F", 0, 0.0), ("F", 1, 1.0), ("B", 0, 5.0), ("B", 1, 8.5)]
    assert starts[1] == [("F", 0, 1.5), ("B", 0, 2.5), ("F", 1, 5.0), ("B", 1, 6.0)]
    assert timeline.p2p_s == (1.0, 1.0)
    assert timeline.bubble_s == (2.5 + 1.0, 1.0)
    assert timeline.step_s == 10.5


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = simulate_1f1b([1.0, 3.0, 1.0], [1.0, 3.0, 1.0], 100)
    # It starts after one forward of the first stage, and the first stage's last backward follows its end.
    assert timeline.step_s == pytest.approx(1.0 + 100 * 6.0 + 1.0)
