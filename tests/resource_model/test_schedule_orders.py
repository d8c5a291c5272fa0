"""The orders of the schedules: torch's own where it has the schedule, and complete everywhere."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.schedule import Action, rank_order
from piper_hpc.spec.schedules import SCHEDULES, schedule_problem, stage_of

Text = list[tuple[str, int, int]]
"""(kind, stage, micro-batch) in order; an overlapped pair is its forward, then its backward, both marked."""

SHAPES = [(2, 4), (2, 6), (4, 8), (4, 12), (4, 20), (8, 16), (8, 24)]


def ours(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> Text:
    """The order of a rank in global stages."""
    text = []
    for action in rank_order(schedule, rank, pp, vpp, micro_batches):
        mark = "" if action.backward is None else "&"
        text += [(mark + p.kind, stage_of(schedule, rank, p.chunk, pp), p.micro_batch) for p in action.parts]
    return text


def torchs(actions: list[Any]) -> Text:
    """The computations of torch's intermediate representation."""
    text: Text = []
    for action in actions:
        if action is None or action.computation_type.name == "REDUCE_GRAD":
            continue
        parts = action.sub_actions or (action,)
        mark = "&" if action.sub_actions else ""
        text += [(mark + p.computation_type.value, p.stage_index, p.microbatch_index) for p in parts]
    return text


@pytest.mark.parametrize(("pp", "micro_batches"), SHAPES)
@pytest.mark.parametrize(
    ("schedule", "name", "vpp"),
    [
        ("gpipe", "GPipe", 1),
        ("1f1b", "1F1B", 1),
        ("interleaved", "Interleaved1F1B", 2),
        ("interleaved", "Interleaved1F1B", 3),
        ("zbv", "ZBVZeroBubble", 2),
        ("dualpipev", "DualPipeV", 2),
    ],
)
def test_the_order_is_torchs(schedule: str, name: str, vpp: int, pp: int, micro_batches: int) -> None:
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    theirs = visualizer.get_schedule_ops(name, pp, micro_batches, num_stages_per_rank=vpp if vpp > 1 else None)
    for rank in range(pp):
        text, expected = ours(schedule, rank, pp, vpp, micro_batches), torchs(theirs[rank])
        if schedule == "1f1b" and rank == pp - 1:
            # torch 2.13 prints the forwards of the last rank one too high (F1 ... FM); it runs F0 ... FM-1.
            expected = [(kind, stage, index - (kind == "F")) for kind, stage, index in expected]
        assert text == expected


@pytest.mark.parametrize(("pp", "micro_batches"), SHAPES)
def test_zb_h1_is_torchs_interleaved_zero_bubble_with_one_chunk(pp: int, micro_batches: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    one_chunk = SimpleNamespace(
        n_local_stages=1, microbatches_per_round=pp, pp_group_size=pp, _n_microbatches=micro_batches
    )
    write = schedules.ScheduleInterleavedZeroBubble._calculate_single_rank_operations
    for rank in range(pp):
        assert ours("zb_h1", rank, pp, 1, micro_batches) == torchs(write(one_chunk, rank))


@given(st.sampled_from(SCHEDULES), st.integers(1, 7), st.integers(1, 4), st.integers(1, 30))
def test_every_micro_batch_passes_every_chunk_once(schedule: str, pp: int, vpp: int, micro_batches: int) -> None:
    if schedule_problem(schedule, pp, vpp, micro_batches) is not None:
        return
    for rank in range(pp):
        parts = [part for action in rank_order(schedule, rank, pp, vpp, micro_batches) for part in action.parts]
        seen = Counter((part.kind, part.chunk, part.micro_batch) for part in parts)
        assert set(seen.values()) == {1}
        for chunk in range(vpp):
            for index in range(micro_batches):
                kinds = [kind for kind in "FBIW" if seen[kind, chunk, index]]
                assert kinds in (["F", "B"], ["F", "I", "W"])


@given(st.sampled_from(SCHEDULES), st.integers(1, 9), st.integers(1, 4))
def test_ranks_and_chunks_hold_every_stage_once(schedule: str, pp: int, vpp: int) -> None:
    vpp = 2 if schedule in ("zbv", "dualpipev") else vpp
    stages = [stage_of(schedule, rank, chunk, pp) for rank in range(pp) for chunk in range(vpp)]
    assert sorted(stages) == list(range(pp * vpp))


def test_megatrons_interleaved_order_of_a_first_rank() -> None:
    # Two ranks, two chunks, four micro-batches: two go through both chunks before the third starts.
    order = rank_order("interleaved", 0, 2, 2, 4)
    forwards = [(action.micro_batch, action.chunk) for action in order if action.kind == "F"]
    assert forwards == [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert [action.kind for action in order[:6]] == ["F", "F", "F", "F", "F", "B"]
    assert order[5] == Action("B", 0, 1)


def test_a_plan_that_runs_has_no_problem() -> None:
    assert schedule_problem("interleaved", 4, 2, 8) is None
    assert schedule_problem("dualpipev", 4, 2, 8) is None
    assert schedule_problem("1f1b", 8, 1, 3) is None
