"""The timeline of a step: its accounting everywhere, 1F1B by hand, its rules, its memory and its speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.schedule import Action, Timeline, peak_held, rank_order, simulate
from piper_hpc.resource_model.schedule.simulation import StageTimes, simulate_orders
from piper_hpc.spec.schedules import SCHEDULES, stage_of

SECONDS = st.floats(1e-3, 10.0)


@dataclass(frozen=True)
class Drawn:
    """A pipeline with times of its own for every stage and boundary."""

    schedule: str
    pp: int
    vpp: int
    micro_batches: int
    forward_s: list[float]
    input_s: list[float]
    weight_s: list[float]
    down_s: list[float]
    up_s: list[float]
    overlap_s: list[float]
    blocking: bool

    def play(self) -> Timeline:
        return simulate(
            self.schedule,
            self.pp,
            self.micro_batches,
            self.forward_s,
            [i + w for i, w in zip(self.input_s, self.weight_s, strict=True)],
            weight_s=self.weight_s,
            send_forward_s=self.down_s,
            send_backward_s=self.up_s,
            overlap_s=self.overlap_s,
            blocking=self.blocking,
        )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """(schedule, pp, vpp, micro_batches) that the schedule allows."""
    schedule = draw(st.sampled_from(SCHEDULES))
    if schedule == "interleaved":
        pp = draw(st.integers(2, 5))
        return schedule, pp, draw(st.integers(2, 4)), pp * draw(st.integers(1, 4))
    pp = draw(st.integers(1, 6))
    least = 2 * pp if schedule == "dualpipev" else 1
    return schedule, pp, 2 if schedule in ("zbv", "dualpipev") else 1, least + draw(st.integers(0, 12))


@st.composite
def pipelines(draw: st.DrawFn) -> Drawn:
    schedule, pp, vpp, micro_batches = draw(shapes())
    stages = pp * vpp

    def times(length: int, low: float = 1e-3) -> list[float]:
        return draw(st.lists(st.floats(low, 10.0), min_size=length, max_size=length))

    forward, input_, weight = times(stages), times(stages), times(stages)
    saved = [draw(st.floats(0.0, 0.9)) * min(forward) for _ in range(pp)]
    down, up = times(stages - 1, 0.0), times(stages - 1, 0.0)
    blocking = draw(st.booleans())
    return Drawn(schedule, pp, vpp, micro_batches, forward, input_, weight, down, up, saved, blocking)


@given(pipelines())
@settings(deadline=None)
def test_a_rank_works_waits_and_does_nothing_else(drawn: Drawn) -> None:
    timeline = drawn.play()
    for rank in range(drawn.pp):
        end = timeline.busy_s[rank] + timeline.bubble_s[rank] + timeline.p2p_s[rank]
        assert timeline.end_s[rank] == pytest.approx(end)
        stages = [stage_of(drawn.schedule, rank, chunk, drawn.pp) for chunk in range(drawn.vpp)]
        work = drawn.micro_batches * sum(drawn.forward_s[s] + drawn.input_s[s] + drawn.weight_s[s] for s in stages)
        timed_actions = timeline.timed_actions[rank]
        saved = sum(slot.kind == "FB" for slot in timed_actions) * drawn.overlap_s[rank]
        assert timeline.busy_s[rank] == pytest.approx(work - saved)
        order = rank_order(drawn.schedule, rank, drawn.pp, drawn.vpp, drawn.micro_batches)
        assert [slot.action for slot in timed_actions] == order
        for slot, following in pairwise(timed_actions):
            assert following.start_s - following.p2p_s >= slot.end_s - 1e-9


@given(pipelines())
@settings(deadline=None)
def test_nothing_starts_before_what_it_needs(drawn: Drawn) -> None:
    timeline = drawn.play()
    start, end = {}, {}
    for rank, timed_actions in enumerate(timeline.timed_actions):
        for slot in timed_actions:
            for part in slot.action.parts:
                key = (part.kind, stage_of(drawn.schedule, rank, part.chunk, drawn.pp), part.micro_batch)
                assert key not in start
                start[key], end[key] = slot.start_s, slot.end_s
    stages = drawn.pp * drawn.vpp
    rank_of = {stage_of(drawn.schedule, r, c, drawn.pp): r for r in range(drawn.pp) for c in range(drawn.vpp)}
    for index in range(drawn.micro_batches):
        gradient = [end.get(("B", stage, index), end.get(("I", stage, index))) for stage in range(stages)]
        for stage in range(stages):
            whole = ("B", stage, index) in start
            assert whole != (("I", stage, index) in start)
            backward = start["B" if whole else "I", stage, index]
            assert backward >= end["F", stage, index] - 1e-9
            if not whole:
                assert start["W", stage, index] >= gradient[stage] - 1e-9
            if stage:
                far = rank_of[stage] != rank_of[stage - 1]
                arrival = end["F", stage - 1, index] + far * drawn.down_s[stage - 1]
                assert start["F", stage, index] >= arrival - 1e-9
                sent = gradient[stage] + far * drawn.up_s[stage - 1]
                previous = "B" if ("B", stage - 1, index) in start else "I"
                assert start[previous, stage - 1, index] >= sent - 1e-9


@given(pipelines())
@settings(deadline=None)
def test_waiting_for_every_transfer_is_never_faster(drawn: Drawn) -> None:
    waits, posts_early = (Drawn(**{**vars(drawn), "blocking": blocking}).play().step_s for blocking in (True, False))
    assert posts_early <= waits * (1 + 1e-9)


@given(shapes(), SECONDS, SECONDS, SECONDS)
@settings(deadline=None)
def test_a_one_stage_pipeline_has_no_bubble(
    shape: tuple[str, int, int, int], forward: float, input_: float, weight: float
) -> None:
    schedule, _, vpp, micro_batches = shape
    if schedule == "interleaved":
        schedule, vpp = "1f1b", 1  # one rank has nothing to interleave with
    timeline = simulate(
        schedule,
        1,
        micro_batches,
        [forward] * vpp,
        [input_ + weight] * vpp,
        weight_s=[weight] * vpp,
        send_forward_s=[1.0] * (vpp - 1),
        send_backward_s=[1.0] * (vpp - 1),
    )
    assert timeline.bubble_s == (0.0,)
    assert timeline.p2p_s == (0.0,)


def test_two_stages_by_hand() -> None:
    # F 1 s, B 2 s, a message 0.5 s each way, two micro-batches; both ends wait for every message.
    #   stage 0: F0 0-1, F1 1-2, waits for the gradient of 0 until 5.0, B0 5-7, gradient of 1 at 8.5, B1 8.5-10.5
    #   stage 1: F0 1.5-2.5, B0 2.5-4.5, F1 5-6, B1 6-8
    timeline = simulate("1f1b", 2, 2, [1.0, 1.0], [2.0, 2.0], send_forward_s=[0.5], send_backward_s=[0.5])
    starts = [[(s.kind, s.micro_batch, s.start_s) for s in stage] for stage in timeline.timed_actions]
    assert starts[0] == [("F", 0, 0.0), ("F", 1, 1.0), ("B", 0, 5.0), ("B", 1, 8.5)]
    assert starts[1] == [("F", 0, 1.5), ("B", 0, 2.5), ("F", 1, 5.0), ("B", 1, 6.0)]
    assert timeline.p2p_s == (1.0, 1.0)
    assert timeline.bubble_s == (2.5 + 1.0, 1.0)
    assert timeline.step_s == 10.5


def test_the_same_with_receives_posted_early() -> None:
    # F1 of stage 0 ends at 2, so its message is there at 2.5 while stage 1 still computes B0.
    #   stage 0: F0 0-1, F1 1-2, B0 5-7, gradient of 1 sent at 7.5 arrives at 8, B1 8-10
    #   stage 1: F0 1.5-2.5, B0 2.5-4.5, F1 4.5-5.5, B1 5.5-7.5
    timeline = simulate(
        "1f1b", 2, 2, [1.0, 1.0], [2.0, 2.0], send_forward_s=[0.5], send_backward_s=[0.5], blocking=False
    )
    assert [slot.start_s for slot in timeline.timed_actions[1]] == [1.5, 2.5, 4.5, 5.5]
    assert timeline.p2p_s == (1.0, 0.5)
    assert timeline.bubble_s == (2.5 + 0.5, 1.0)
    assert timeline.step_s == 10.0


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = simulate("1f1b", 3, 100, [1.0, 3.0, 1.0], [1.0, 3.0, 1.0])
    # It starts after one forward of the first stage, and the first stage's last backward follows its end.
    assert timeline.step_s == pytest.approx(1.0 + 100 * 6.0 + 1.0)


def test_zbv_has_no_bubble_between_first_and_last_action_where_its_three_parts_are_equal() -> None:
    timeline = simulate("zbv", 4, 16, [1.0] * 8, [2.0] * 8, weight_s=[1.0] * 8)
    for rank, timed_actions in enumerate(timeline.timed_actions):
        assert timed_actions[0].start_s == rank
        assert timed_actions[-1].end_s - timed_actions[0].start_s == timeline.busy_s[rank] == 96.0


def test_memory_comes_with_the_timeline_in_the_units_given() -> None:
    # The last rank of 1F1B holds one micro-batch, the first as many as there are ranks.
    timeline = simulate("1f1b", 3, 6, [1.0] * 3, [2.0] * 3, held=[[7.0], [5.0], [11.0]])
    assert timeline.peak_held == (3 * 7.0, 2 * 5.0, 11.0)
    # A rank of ZBV with a heavy second chunk (the head) holds one of those and 2 PP - 1 of the others.
    assert peak_held(rank_order("zbv", 0, 4, 2, 16), [1.0, 100.0]) == 7 * 1.0 + 100.0


@pytest.mark.parametrize(
    ("schedule", "pp", "stages", "micro_batches", "rule"),
    [
        ("zero", 2, 2, 4, "unknown"),
        ("1f1b", 2, 4, 4, "use vpp=1"),
        ("zbv", 2, 2, 4, "use vpp=2"),
        ("interleaved", 4, 8, 6, "multiple of pp=4.*use 8"),
        ("interleaved", 4, 4, 8, "use vpp=2"),
        ("interleaved", 1, 2, 8, "at least two ranks"),
        ("dualpipev", 4, 8, 7, "at least 2 pp = 8"),
        ("1f1b", 2, 2, 0, "at least 1"),
        ("1f1b", 2, 3, 4, "forward_s has 3 values, this pipeline needs 2"),
        ("zb_h1", 2, 2, 4, "weight_s needs 2 values"),
    ],
)
def test_a_rule_is_named_with_a_value_that_works(
    schedule: str, pp: int, stages: int, micro_batches: int, rule: str
) -> None:
    with pytest.raises(ResourceModelError, match=rule):
        simulate(schedule, pp, micro_batches, [1.0] * stages, [2.0] * stages)


def test_an_order_that_cannot_proceed_says_where() -> None:
    # Rank 0 wants the gradient before it has sent what the gradient is of.
    orders = [[Action("B", 0), Action("F", 0)], [Action("F", 0), Action("B", 0)]]
    costs = StageTimes(
        {"F": [1.0, 1.0], "B": [1.0, 1.0]}, send_forward_s=[0.0], send_backward_s=[0.0], overlap_s=[0.0, 0.0]
    )
    with pytest.raises(ResourceModelError, match="rank 0 waits for ever before B of micro-batch 0"):
        simulate_orders(orders, [[0], [1]], 1, costs, blocking=True)


def test_a_large_pipeline_is_simulated_in_seconds() -> None:
    pp, vpp = 64, 4
    stages = pp * vpp
    started = time.process_time()
    timeline = simulate("interleaved", pp, 512, [1.0] * stages, [2.0] * stages)
    assert time.process_time() - started < 5.0  # about 1 s alone on a core of 2024
    assert sum(map(len, timeline.timed_actions)) == 2 * stages * 512
