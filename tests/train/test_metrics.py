"""A row of metrics from what ranks recorded: pure arithmetic, no processes."""

from __future__ import annotations

import gc
import sys
from types import FrameType
from typing import Any

import numpy as np
import pytest

from piper_hpc.parallel.meter import SentBytes
from piper_hpc.profiling.spans import ALL_RANKS, BACKWARD, FORWARD, WAIT, Message, Span
from piper_hpc.spec import TERMS, Layout, RankMap
from piper_hpc.train.metrics import summarise, terms_by_rank
from piper_hpc.train.record import OWN_SENDS, TIMED_REGIONS, Records, RecordShape, rank_record
from tests.train.record_cost import random_records

END_OF_STEP = Message(ALL_RANKS)
TWO_STAGES = Layout(pp=2)
SENT = SentBytes({"node": 1.0, "rack": 2.0, "system": 3.0}, {"node": 4.0, "rack": 5.0, "system": 6.0})


def shape_of(layout: Layout, layers: int = 2, experts: int = 3) -> RecordShape:
    return RecordShape.of(layout, 2, layers=layers, experts=experts)


def recorded(
    layout: Layout = TWO_STAGES,
    *,
    start_s: float = 100.0,
    end_s: float = 110.0,
    seconds: dict[str, float] | None = None,
    posts: dict[Message, float] | None = None,
    waits: tuple[tuple[float, float, Message | None], ...] = (),
    expert_tokens: list[list[int]] | None = None,
    sent: SentBytes | None = None,
    experts: int = 3,
    layers: int = 2,
    **numbers: float,
) -> np.ndarray:
    """A rank's record of a step, on whose timeline the regions of `seconds` stand one after the other at its end."""
    spans = [Span("other", start_s, end_s)]
    spans += [Span(WAIT, start, end, message=message) for start, end, message in waits]
    at = end_s
    for name, length in (seconds or {}).items():
        at -= length
        spans.append(Span(name, at, at + length))
    given = {"loss": 0.0, "aux_loss": 0.0, "grad_norm": 2.0, "peak_memory_bytes": 7, "rss_bytes": 9} | numbers
    return rank_record(
        shape_of(layout, layers, experts),
        sorted(spans, key=lambda span: (span.start_s, -span.end_s)),
        {END_OF_STEP: 109.0} if posts is None else posts,
        0.0,
        sent=sent or SentBytes(),
        expert_tokens=np.zeros((1, experts), int) if expert_tokens is None else np.array(expert_tokens),
        **given,
    )


def together(layout: Layout, *made: np.ndarray, layers: int = 2, experts: int = 3) -> Records:
    return Records(shape_of(layout, layers, experts), np.concatenate(made))


def terms_of(rank: int, records: Records, layout: Layout = TWO_STAGES) -> dict[str, float]:
    return {term: float(each[rank]) for term, each in terms_by_rank(records, layout).items()}


def test_record_is_the_step_on_rank_0s_clock() -> None:
    spans = [
        Span("other", 1.0, 5.0),
        Span("expert", 2.0, 3.0),
        Span(WAIT, 3.0, 4.0, message=Message(BACKWARD, 0, 1)),
        Span(WAIT, 4.0, 4.5),
    ]
    posts = {Message(FORWARD, 1, 1): 1.5, Message(BACKWARD, 0, 0): 2.5, END_OF_STEP: 3.0}
    (made,) = rank_record(
        shape_of(TWO_STAGES), spans, posts, 100.0, sent=SENT, expert_tokens=np.array([[1, 2, 3]]),
        loss=0.5, aux_loss=0.25, grad_norm=2.0, peak_memory_bytes=7, rss_bytes=9,
    )  # fmt: skip
    assert (made["start_s"], made["end_s"]) == (101.0, 105.0)
    assert made["seconds"]["expert"] == 1.0 and made["seconds"]["attention"] == 0.0
    np.testing.assert_array_equal(made["posts_s"], [np.nan, 101.5, 102.5, np.nan, 103.0])
    assert made["waits"][:2].tolist() == [(103.0, 104.0, BACKWARD, 0, 1), (104.0, 104.5, OWN_SENDS, 0, 0)]
    assert set(made["waits"][2:].tolist()) == {(0.0, 0.0, OWN_SENDS, 0, 0)}
    assert made["payload_bytes"].tolist() == [1, 2, 3] and made["metadata_bytes"].tolist() == [4, 5, 6]
    assert made["expert_tokens"].tolist() == [[1, 2, 3]]
    assert [float(made[name]) for name in ("loss", "aux_loss", "grad_norm")] == [0.5, 0.25, 2.0]


def test_stages_with_fewer_layers_send_as_much_as_the_others() -> None:
    shape = RecordShape.of(Layout(pp=2), 2, layers=5, experts=3)
    assert shape.layers == ((0, 1, 2), (3, 4)) and shape.dtype["expert_tokens"].shape == (3, 3)
    assert np.zeros(1, shape.dtype)["posts_s"].flags.aligned, "the second record of a gathered array is aligned too"


def test_more_waits_than_a_step_has_are_an_error() -> None:
    with pytest.raises(IndexError):
        recorded(waits=((101.0, 102.0, None),) * (shape_of(TWO_STAGES).waits + 1))


def test_wait_of_the_second_stage_is_judged_by_the_first_stages_post() -> None:
    activations = Message(FORWARD, 1, 0)
    records = together(
        TWO_STAGES,
        recorded(posts={END_OF_STEP: 109.0, activations: 103.0}),
        recorded(waits=((101.0, 104.0, activations), (106.0, 106.5, None)), posts={END_OF_STEP: 108.0}),
    )
    terms = terms_of(1, records)
    assert terms["bubble_s"] == pytest.approx(2.0)
    assert terms["p2p_s"] == pytest.approx(1.0 + 0.5)
    assert sum(terms.values()) == pytest.approx(10.0)


def test_gradients_come_from_the_next_stage() -> None:
    gradients = Message(BACKWARD, 0, 1)
    records = together(
        TWO_STAGES,
        recorded(waits=((101.0, 104.0, gradients),)),
        recorded(posts={END_OF_STEP: 109.0, gradients: 103.5}),
    )
    assert terms_of(0, records)["bubble_s"] == pytest.approx(2.5)


def test_wait_for_what_nobody_posted_is_no_number() -> None:
    records = together(TWO_STAGES, recorded(waits=((101.0, 104.0, Message(BACKWARD, 0, 1)),)), recorded())
    assert np.isnan(terms_of(0, records)["bubble_s"]) and not np.isnan(terms_of(1, records)["bubble_s"])


@pytest.mark.parametrize("layout", [Layout(pp=4, ep=2, dp=3), Layout(pp=2, ep=2, etp=2, dp=2), Layout(pp=3)])
@pytest.mark.parametrize(("kind", "towards"), [(FORWARD, -1), (BACKWARD, 1)])
def test_each_rank_waits_for_its_own_neighbour_in_the_rank_map(layout: Layout, kind: int, towards: int) -> None:
    """A bubble is as long as only that neighbour's post makes it: rank r posts r ms after all began to wait."""
    rank_map = RankMap.block(layout, layout.ranks, (0,))
    stage = [each.pipeline_rank for each in rank_map.places]
    receiving = [rank for rank in range(layout.ranks) if 0 <= stage[rank] + towards < layout.pp]
    sending = [rank for rank in range(layout.ranks) if 0 <= stage[rank] - towards < layout.pp]
    records = together(
        layout,
        *(
            recorded(
                layout,
                posts={END_OF_STEP: 109.0}
                | ({Message(kind, stage[rank] - towards, 1): 101.0 + rank / 1e3} if rank in sending else {}),
                waits=((101.0, 105.0, Message(kind, stage[rank], 1)),) if rank in receiving else (),
                layers=layout.pp,
            )
            for rank in range(layout.ranks)
        ),
        layers=layout.pp,
    )
    bubbles = terms_by_rank(records, layout)["bubble_s"]
    for rank in receiving:
        sender = rank_map.pipeline_group(rank)[rank_map.places[rank].pipeline_rank + towards]
        assert bubbles[rank] == pytest.approx(sender / 1e3)


@pytest.mark.parametrize("schedule", ["interleaved", "zbv"])
def test_each_chunk_waits_for_the_rank_that_holds_the_stage_before(schedule: str) -> None:
    """The wait of every stage for its predecessor's activations is judged by that stage's post, and no other's."""
    layout = Layout(pp=2, vpp=2, schedule=schedule)
    places = RankMap.block(layout, 2, (0,)).places
    shape = RecordShape.of(layout, 2, layers=4, experts=3)
    made = []
    for place in places:
        spans = [Span("other", 100.0, 110.0)]
        spans += [Span(WAIT, 101.0 + s, 102.0 + s, message=Message(FORWARD, s, 1)) for s in place.stages if s]
        posts = {Message(FORWARD, s + 1, 1): 102.0 + s + (s + 1) / 10 for s in place.stages if s < 3}
        tokens = np.zeros((2, 3), int)
        numbers = {"loss": 0.0, "aux_loss": 0.0, "grad_norm": 1.0, "peak_memory_bytes": 1.0, "rss_bytes": 1.0}
        spans.sort(key=lambda span: (span.start_s, -span.end_s))
        made.append(rank_record(shape, spans, posts, 0.0, sent=SentBytes(), expert_tokens=tokens, **numbers))
    bubbles = terms_by_rank(Records(shape, np.concatenate(made)), layout)["bubble_s"]
    # Stage s waits from 101 + s on for what stage s - 1 posts at 101 + s + s / 10: a bubble of s / 10 seconds.
    assert bubbles == pytest.approx([sum(s / 10 for s in place.stages) for place in places])


def test_waiting_at_the_clipping_for_the_slower_stage_is_a_bubble() -> None:
    records = together(
        TWO_STAGES,
        recorded(posts={END_OF_STEP: 109.0}, waits=((109.0, 109.25, END_OF_STEP),)),
        recorded(posts={END_OF_STEP: 107.0}, waits=((107.0, 109.25, END_OF_STEP),)),
    )
    fast, slow = terms_of(1, records), terms_of(0, records)
    assert (fast["bubble_s"], fast["grad_reduce_s"]) == pytest.approx((2.0, 0.25))
    assert (slow["bubble_s"], slow["grad_reduce_s"]) == pytest.approx((0.0, 0.25))


def test_row_shows_the_busiest_stage_and_adds_up() -> None:
    layout = Layout(pp=2, ep=2)
    waits = ((101.0, 105.0, None),)
    busy = {"attention": 4.0, "expert": 2.0}
    experts = {"experts": 4}
    records = together(
        layout,
        recorded(layout, start_s=99.0, loss=0.5, expert_tokens=[[3, 0, 0, 0]], waits=waits, **experts),
        recorded(layout, aux_loss=0.25, expert_tokens=[[1, 2, 0, 2]], waits=waits, sent=SENT, **experts),
        recorded(layout, seconds=busy, loss=1.0, expert_tokens=[[2, 2, 2, 0]], end_s=111.0, **experts),
        recorded(layout, seconds=busy | {"attention": 2.0}, expert_tokens=[[0, 0, 2, 0]], sent=SENT, **experts),
        experts=4,
    )
    row = summarise(records, layout, tokens=240)
    assert row["critical_stage"] == 1
    assert row["attention_s"] == pytest.approx(3.0)
    assert row["step_time_s"] == pytest.approx(12.0)
    assert sum(row[term] for term in TERMS) == pytest.approx(12.0)
    assert all(sum(stage.values()) == pytest.approx(12.0) for stage in row["stages"])
    assert row["other_self_s"] == pytest.approx((11.0 - 4.0 - 2.0 + 10.0 - 2.0 - 2.0) / 2)
    assert row["other_s"] == pytest.approx(row["other_self_s"] + 12.0 - (11.0 + 10.0) / 2)
    assert (row["loss"], row["aux_loss"], row["tokens_per_s"]) == pytest.approx((1.5, 0.25, 20.0))
    assert row["exchange"]["payload_bytes"] == {"node": 2, "rack": 4, "system": 6}
    assert row["exchange"]["metadata_bytes"] == {"node": 8, "rack": 10, "system": 12}
    assert row["expert_load"] == pytest.approx([4 / 2, 4 / 2])
    assert row["peak_memory_bytes"] == [7, 7, 7, 7] and row["rss_bytes"] == [9, 9, 9, 9]


def test_load_of_ranks_is_that_of_the_experts_they_hold_within_each_group() -> None:
    layout, one, two = Layout(ep=2, dp=2), [[3, 1, 0, 0]], [[0, 0, 2, 2]]

    def rank_load(*by_rank: list[list[int]]) -> list[float]:
        made = [recorded(layout, expert_tokens=tokens, experts=4, layers=1) for tokens in by_rank]
        loads: list[float] = summarise(together(layout, *made, layers=1, experts=4), layout, tokens=8)["rank_load"]
        return loads

    assert rank_load(one, one, one, one) == [2.0]
    assert rank_load(one, two, one, one) == pytest.approx([(1.0 + 2.0) / 2])


def test_layers_of_a_row_are_in_the_models_order_whatever_rank_holds_them() -> None:
    shape = RecordShape(2, experts=2, stages=((0, 3), (1, 2)), layers=((0, 3), (1, 2)))
    ranks = np.zeros(2, shape.dtype)
    ranks["end_s"] = 1.0
    ranks["waits"]["kind"] = OWN_SENDS
    ranks["expert_tokens"] = [[[4, 0], [1, 1]], [[3, 1], [2, 2]]]
    row = summarise(Records(shape, ranks), Layout(pp=2), tokens=1)
    assert row["expert_load"] == pytest.approx([2.0, 1.5, 1.0, 1.0])


def test_row_of_a_step_that_was_not_timed_has_no_terms() -> None:
    timed, untimed = (RecordShape.of(TWO_STAGES, 8, layers=2, experts=2, timed=timed) for timed in (True, False))
    assert untimed.dtype.itemsize < timed.dtype.itemsize
    record = rank_record(
        untimed, [Span("other", 1.0, 3.0)], {}, 0.0, sent=SENT, expert_tokens=np.array([[3, 1]]),
        loss=0.5, aux_loss=0.25, grad_norm=2.0, peak_memory_bytes=7, rss_bytes=9,
    )  # fmt: skip
    row = summarise(Records(untimed, np.concatenate([record, record])), TWO_STAGES, tokens=10)
    assert (row["step_time_s"], row["tokens_per_s"], row["loss"], row["grad_norm"]) == (2.0, 5.0, 1.0, 2.0)
    assert row["expert_load"] == [1.5, 1.5] and row["peak_memory_bytes"] == [7, 7]
    assert set(row["exchange"]) == {"payload_bytes", "metadata_bytes"}
    assert not {*TERMS, "other_self_s", "critical_stage", "stages"} & set(row)


def lines_run(function: Any, *arguments: Any, **more: Any) -> int:
    """Lines of Python that a call runs, its callees included."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # what it finds would be finalised by lines of Python in the middle of the call
    sys.settrace(trace)
    try:
        function(*arguments, **more)
    finally:
        sys.settrace(before)
        gc.enable()
    return count


def test_row_of_many_ranks_layers_and_experts_runs_no_more_python_than_that_of_few() -> None:
    """What grows is inside NumPy: that is what holds the row of 256 ranks below 10 ms (tests/train/record_cost.py)."""
    few, many = Layout(pp=2, ep=2, dp=2), Layout(pp=2, ep=8, dp=8)
    small = random_records(few, micro_batches=2, layers=4, experts=8)
    large = random_records(many, micro_batches=16, layers=32, experts=64)
    for records, layout in ((small, few), (large, many)):
        summarise(records, layout, tokens=1)  # what is imported or cached on first use
    assert lines_run(summarise, large, many, tokens=1) == lines_run(summarise, small, few, tokens=1)


def test_every_timed_region_is_a_term() -> None:
    assert {f"{name}_s" for name in TIMED_REGIONS} | {"p2p_s", "bubble_s", "other_s"} == set(TERMS)
