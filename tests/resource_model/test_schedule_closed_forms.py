"""The formulas equal the simulation where their assumptions hold, and the papers' special cases always."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.schedule import (
    Timeline,
    Work,
    bubble_fraction,
    bubble_s,
    exposed_messages,
    in_flight,
    in_flight_by_chunk,
    peak_held,
    rank_order,
    simulate,
    step_s,
)
from piper_hpc.spec.schedules import SCHEDULES, stage_of

SECONDS = st.floats(0.03, 10.0)


def equal(
    schedule: str,
    pp: int,
    vpp: int,
    micro_batches: int,
    work: Work,
    *,
    overlap_s: float = 0.0,
    message_s: float = 0.0,
    blocking: bool = True,
) -> Timeline:
    """The simulated step of equal chunks; `work` is of a whole rank."""
    stages = pp * vpp
    return simulate(
        schedule,
        pp,
        micro_batches,
        [work.forward_s / vpp] * stages,
        [(work.input_s + work.weight_s) / vpp] * stages,
        weight_s=[work.weight_s / vpp] * stages,
        overlap_s=[overlap_s] * pp,
        send_forward_s=[message_s] * (stages - 1),
        send_backward_s=[message_s] * (stages - 1),
        blocking=blocking,
    )


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """(schedule, pp, vpp, micro_batches) for which the closed form is exact."""
    schedule = draw(st.sampled_from(SCHEDULES))
    if schedule == "interleaved":
        pp = draw(st.integers(2, 6))
        return schedule, pp, draw(st.integers(2, 4)), pp * draw(st.integers(1, 4))
    pp = draw(st.integers(1, 8))
    micro_batches = draw(st.integers(2 * pp if schedule == "dualpipev" else 1, 2 * pp + 12))
    if schedule == "zbv" and pp < micro_batches < 2 * pp - 1:
        micro_batches += pp
    return schedule, pp, 2 if schedule in ("zbv", "dualpipev") else 1, micro_batches


@given(shapes(), SECONDS, SECONDS, SECONDS, st.floats(0.0, 0.9))
@settings(deadline=None, max_examples=400)
def test_equal_ranks_take_the_closed_form(
    shape: tuple[str, int, int, int], forward: float, input_: float, weight: float, overlapped: float
) -> None:
    schedule, pp, vpp, micro_batches = shape
    work = Work(forward, input_, weight)
    overlap_s = overlapped * min(forward, input_ + weight) / 2
    timeline = equal(schedule, pp, vpp, micro_batches, work, overlap_s=overlap_s)
    assert timeline.step_s == pytest.approx(step_s(schedule, pp, vpp, micro_batches, work, overlap_s=overlap_s))
    if schedule != "dualpipev":
        idle = 1 - micro_batches * work.total_s / timeline.step_s
        assert idle == pytest.approx(bubble_fraction(schedule, pp, vpp, micro_batches, work), abs=1e-9)


@given(st.integers(3, 8), st.data(), st.floats(0.9, 1.5), st.floats(0.6, 1.1))
@settings(deadline=None)
def test_between_pp_and_two_pp_micro_batches_zbv_is_interpolated_and_never_too_fast(
    pp: int, data: st.DataObject, input_: float, weight: float
) -> None:
    micro_batches, work = data.draw(st.integers(pp + 1, 2 * pp - 2)), Work(1.0, input_, weight)
    error = step_s("zbv", pp, 2, micro_batches, work) / equal("zbv", pp, 2, micro_batches, work).step_s - 1
    assert -1e-9 <= error < 0.06


@pytest.mark.parametrize(
    ("schedule", "vpp", "bubble"),
    [
        ("gpipe", 1, 7 * 3.0),
        ("1f1b", 1, 7 * 3.0),
        ("interleaved", 4, 7 * 3.0 / 4),
        ("zb_h1", 1, 7 * 1.0),  # (PP - 1) (F + I - W) = (PP - 1) (F + B - 2 W)
        ("zbv", 2, 7 * 0.5),  # nothing but the wait of the last rank for its first message
        ("dualpipev", 2, 7 * (1.5 + 1.0 - 3 * 0.5)),  # (PP - 1) (F&B + B - 3 W) of half ranks, no overlap gained
    ],
)
def test_the_papers_bubbles(schedule: str, vpp: int, bubble: float) -> None:
    work = Work(1.0, 1.0, 1.0)
    assert bubble_s(schedule, 8, vpp, work) == pytest.approx(bubble)
    assert equal(schedule, 8, vpp, 32, work).step_s == pytest.approx(32 * 3.0 + bubble)


def test_the_papers_bubble_fractions() -> None:
    work = Work(1.0, 1.3, 0.7)
    assert bubble_fraction("1f1b", 8, 1, 32, work) == pytest.approx(7 / (32 + 7))
    assert bubble_fraction("gpipe", 8, 1, 32, work) == pytest.approx(7 / (32 + 7))
    assert bubble_fraction("interleaved", 8, 4, 32, work) == pytest.approx(7 / (4 * 32 + 7))


@given(shapes())
@settings(deadline=None)
def test_never_more_alive_than_memory_counts(shape: tuple[str, int, int, int]) -> None:
    schedule, pp, vpp, micro_batches = shape
    for rank in range(pp):
        order = rank_order(schedule, rank, pp, vpp, micro_batches)
        assert peak_held(order, [1.0] * vpp) == in_flight(schedule, rank, pp, vpp, micro_batches)
        counts = in_flight_by_chunk(schedule, rank, pp, vpp, micro_batches)
        assert counts in _alive_at_peak(schedule, rank, pp, vpp, micro_batches)


def _alive_at_peak(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> list[tuple[int, ...]]:
    """Chunk counts at every moment when the rank holds the most."""
    alive, moments = [0] * vpp, []
    for action in rank_order(schedule, rank, pp, vpp, micro_batches):
        for part in action.parts:
            if part.kind == "F":
                alive[part.chunk] += 1
                moments.append(tuple(alive))
            elif part.kind != "I":
                alive[part.chunk] -= 1
    assert alive == [0] * vpp
    most = max(map(sum, moments))
    return [moment for moment in moments if sum(moment) == most]


@given(st.integers(3, 7), st.data())
def test_zbv_holds_no_more_than_there_is_with_few_micro_batches(pp: int, data: st.DataObject) -> None:
    micro_batches = data.draw(st.integers(pp + 1, 2 * pp - 2))
    for rank in range(pp):
        order = rank_order("zbv", rank, pp, 2, micro_batches)
        assert peak_held(order, [1.0, 1.0]) == in_flight("zbv", rank, pp, 2, micro_batches)


def test_zero_bubble_and_dualpipe_hold_what_their_papers_say() -> None:
    # In micro-batches of a whole rank: ZB-H1 as much as 1F1B at most, ZBV the same on every rank, DualPipe PP + 1/2.
    assert [in_flight("zb_h1", rank, 8, 1, 64) for rank in range(8)] == [8] * 8
    assert in_flight("1f1b", 0, 8, 1, 64) == 8
    assert [in_flight("zbv", rank, 8, 2, 64) / 2 for rank in range(8)] == [8] * 8
    assert [in_flight("dualpipev", rank, 8, 2, 64) / 2 for rank in range(8)] == [8.5] * 8
    assert in_flight("interleaved", 0, 8, 2, 64) / 2 == 8 * (1 + 7 / 16)  # PP (1 + (PP - 1) / (PP v)), arXiv 2205.05198


@given(st.data(), st.integers(2, 6), st.integers(0, 12))
@settings(deadline=None)
def test_gpipe_is_exact_for_unequal_stages_whose_parts_keep_their_proportion(
    data: st.DataObject, pp: int, more: int
) -> None:
    forward = data.draw(st.lists(SECONDS, min_size=pp, max_size=pp))
    timeline = simulate("gpipe", pp, 1 + more, forward, [2 * seconds for seconds in forward])
    busiest, others = max(forward), sum(forward) - max(forward)
    step = step_s("gpipe", pp, 1, 1 + more, Work(busiest, busiest, busiest), Work(others, others, others))
    assert timeline.step_s == pytest.approx(step)


@pytest.mark.parametrize(
    ("schedule", "vpp", "within"), [("1f1b", 1, 0.05), ("interleaved", 2, 0.07), ("zb_h1", 1, 0.03), ("zbv", 2, 0.05)]
)
def test_unequal_ranks_are_estimated_well_enough_to_rank(schedule: str, vpp: int, within: float) -> None:
    pp, micro_batches = 4, 16
    errors = []
    for seed in range(40):
        chunks = 1 + np.random.default_rng(seed).uniform(-0.15, 0.15, pp * vpp)
        timeline = simulate(schedule, pp, micro_batches, list(chunks), list(2 * chunks), weight_s=list(chunks))
        ranks = [sum(chunks[stage_of(schedule, rank, chunk, pp)] for chunk in range(vpp)) for rank in range(pp)]
        busiest = max(ranks)
        others = sum(ranks) - busiest
        step = step_s(schedule, pp, vpp, micro_batches, Work(*[busiest] * 3), Work(*[others] * 3))
        errors.append(step / timeline.step_s - 1)
    assert np.max(np.abs(errors)) < within


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(("schedule", "vpp"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)])
@pytest.mark.parametrize(("pp", "rounds"), [(2, 2), (3, 2), (4, 4), (8, 3)])
def test_short_messages_add_what_the_formula_says(
    schedule: str, vpp: int, pp: int, rounds: int, blocking: bool
) -> None:
    micro_batches, work, message_s = pp * rounds, Work(1.0, 1.0, 0.7), 1e-3
    free = equal(schedule, pp, vpp, micro_batches, work).step_s
    with_messages = equal(schedule, pp, vpp, micro_batches, work, message_s=message_s, blocking=blocking).step_s
    expected = exposed_messages(schedule, pp, vpp, micro_batches, blocking=blocking)
    assert (with_messages - free) / message_s == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(("schedule", "vpp"), [("zb_h1", 1), ("zbv", 2), ("dualpipev", 2)])
@pytest.mark.parametrize(("pp", "rounds"), [(2, 2), (3, 4), (4, 4), (8, 4)])
def test_short_messages_of_zero_bubble_schedules_to_about_pp_of_them(
    schedule: str, vpp: int, pp: int, rounds: int, blocking: bool
) -> None:
    micro_batches, work, message_s = pp * rounds, Work(1.0, 1.0, 1.0), 1e-3
    free = equal(schedule, pp, vpp, micro_batches, work).step_s
    with_messages = equal(schedule, pp, vpp, micro_batches, work, message_s=message_s, blocking=blocking).step_s
    expected = exposed_messages(schedule, pp, vpp, micro_batches, blocking=blocking)
    assert (with_messages - free) / message_s == pytest.approx(expected, abs=pp + 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_grid_gives_what_its_layouts_give(schedule: str) -> None:
    pp, vpp = 4, {"interleaved": 3, "zbv": 2, "dualpipev": 2}.get(schedule, 1)
    micro_batches = np.array([8, 16, 64])[:, None]
    forward, saved = np.array([0.5, 1.0, 2.0, 4.0])[None, :], 0.1
    step = step_s(schedule, pp, vpp, micro_batches, Work(forward, 1.5 * forward, 0.9), overlap_s=saved)
    waits = exposed_messages(schedule, pp, vpp, micro_batches)
    alive = in_flight(schedule, np.arange(pp)[None, :], pp, vpp, micro_batches)
    assert np.shape(step) == (3, 4)
    for row, count in enumerate((8, 16, 64)):
        assert np.broadcast_to(waits, (3, 1))[row, 0] == exposed_messages(schedule, pp, vpp, count)
        for column, one in enumerate((0.5, 1.0, 2.0, 4.0)):
            scalar = step_s(schedule, pp, vpp, count, Work(one, 1.5 * one, 0.9), overlap_s=saved)
            assert step[row, column] == scalar
        for rank in range(pp):
            assert np.broadcast_to(alive, (3, pp))[row, rank] == in_flight(schedule, rank, pp, vpp, count)


def test_an_unknown_schedule_is_named() -> None:
    for formula in (
        lambda: bubble_s("pipedream", 2, 1, Work(1.0, 1.0)),
        lambda: in_flight("pipedream", 0, 2, 1, 4),
        lambda: exposed_messages("pipedream", 2, 1, 4),
    ):
        with pytest.raises(ResourceModelError, match="'pipedream' is unknown; use one of gpipe, 1f1b"):
            formula()
