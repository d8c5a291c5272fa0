"""A row of metrics from what ranks recorded: pure arithmetic, no processes."""

from __future__ import annotations

import pytest

from piper_hpc.parallel.meter import SentBytes
from piper_hpc.profiling.spans import ALL_RANKS, BACKWARD, FORWARD, WAIT, Message, Span
from piper_hpc.spec import TERMS, Layout, RankMap
from piper_hpc.train.metrics import (
    TIMED_REGIONS,
    RankRecord,
    RecordShape,
    decode,
    encode,
    rank_record,
    summarise,
    terms_of,
)

SHAPE = RecordShape(passes=2, layers=2, experts=3)
END_OF_STEP = Message(ALL_RANKS)
TWO_STAGES = RankMap.block(Layout(pp=2), 2, (0,))


SENT = SentBytes({"node": 1.0, "rack": 2.0, "system": 3.0}, {"node": 4.0, "rack": 5.0, "system": 6.0})


def record(**changes: object) -> RankRecord:
    facts: dict[str, object] = {
        "start_s": 100.0,
        "end_s": 110.0,
        "seconds": dict.fromkeys(TIMED_REGIONS, 0.0),
        "posts": {END_OF_STEP: 109.0},
        "waits": [],
        "loss": 0.0,
        "aux_loss": 0.0,
        "grad_norm": 2.0,
        "peak_memory_bytes": 7,
        "rss_bytes": 9,
        "expert_tokens": [[0, 0, 0], [0, 0, 0]],
    }
    return RankRecord(**{**facts, **changes})  # type: ignore[arg-type]


def test_record_survives_its_journey_as_numbers() -> None:
    sent = record(
        seconds={name: float(index) for index, name in enumerate(TIMED_REGIONS)},
        posts={Message(FORWARD, 1, 1): 101.5, Message(BACKWARD, 0, 0): 103.0, END_OF_STEP: 109.0},
        waits=[(102.0, 103.0, Message(BACKWARD, 0, 1)), (104.0, 105.0, None), (109.0, 109.5, END_OF_STEP)],
        expert_tokens=[[1, 2, 3], [4, 5, 6]],
        sent=SENT,
    )
    numbers = encode(sent, SHAPE)
    assert len(numbers) == len(encode(record(), SHAPE))
    assert decode(numbers, SHAPE) == sent


def test_wait_of_the_second_stage_is_judged_by_the_first_stages_post() -> None:
    activations = Message(FORWARD, 1, 0)
    records = [
        record(posts={END_OF_STEP: 109.0, activations: 103.0}),
        record(waits=[(101.0, 104.0, activations), (106.0, 106.5, None)], posts={END_OF_STEP: 108.0}),
    ]
    terms = terms_of(1, records, TWO_STAGES)
    assert terms["bubble_s"] == pytest.approx(2.0)
    assert terms["p2p_s"] == pytest.approx(1.0 + 0.5)
    assert sum(terms.values()) == pytest.approx(10.0)


def test_gradients_come_from_the_next_stage() -> None:
    gradients = Message(BACKWARD, 0, 1)
    records = [
        record(waits=[(101.0, 104.0, gradients)]),
        record(posts={END_OF_STEP: 109.0, gradients: 103.5}),
    ]
    assert terms_of(0, records, TWO_STAGES)["bubble_s"] == pytest.approx(2.5)


def test_waiting_at_the_clipping_for_the_slower_stage_is_a_bubble() -> None:
    records = [
        record(posts={END_OF_STEP: 109.0}, waits=[(109.0, 109.25, END_OF_STEP)]),
        record(posts={END_OF_STEP: 107.0}, waits=[(107.0, 109.25, END_OF_STEP)]),
    ]
    fast, slow = terms_of(1, records, TWO_STAGES), terms_of(0, records, TWO_STAGES)
    assert (fast["bubble_s"], fast["grad_reduce_s"]) == pytest.approx((2.0, 0.25))
    assert (slow["bubble_s"], slow["grad_reduce_s"]) == pytest.approx((0.0, 0.25))


def test_row_shows_the_busiest_stage_and_adds_up() -> None:
    layout = RankMap.block(Layout(pp=2, ep=2), 4, (0,))
    waits = [(101.0, 105.0, None)]
    busy = dict.fromkeys(TIMED_REGIONS, 0.0) | {"attention": 4.0, "expert": 2.0}
    records = [
        record(start_s=99.0, loss=0.5, expert_tokens=[[3, 0, 0], [0, 0, 0]], waits=waits),
        record(aux_loss=0.25, expert_tokens=[[1, 2, 0], [0, 0, 0]], waits=waits, sent=SENT),
        record(seconds=busy, loss=1.0, expert_tokens=[[0, 0, 0], [2, 2, 2]], end_s=111.0),
        record(seconds=busy | {"attention": 2.0}, expert_tokens=[[0, 0, 0], [0, 0, 6]], sent=SENT),
    ]
    row = summarise(records, layout, tokens=240)
    assert row["critical_stage"] == 1
    assert row["attention_s"] == pytest.approx(3.0)
    assert row["step_time_s"] == pytest.approx(12.0)
    assert sum(row[term] for term in TERMS) == pytest.approx(12.0)
    assert all(sum(stage.values()) == pytest.approx(12.0) for stage in row["stages"])
    assert (row["loss"], row["aux_loss"], row["tokens_per_s"]) == pytest.approx((1.5, 0.25, 20.0))
    assert row["exchange"]["payload_bytes"] == {"node": 2, "rack": 4, "system": 6}
    assert row["exchange"]["metadata_bytes"] == {"node": 8, "rack": 10, "system": 12}
    assert row["expert_load"] == pytest.approx([4 / 2, 8 / 4])
    assert row["peak_memory_bytes"] == [7, 7, 7, 7] and row["rss_bytes"] == [9, 9, 9, 9]


def test_load_of_ranks_is_that_of_the_experts_they_hold_within_each_group() -> None:
    two_groups = RankMap.block(Layout(ep=2, dp=2), 4, (0,))
    one, two = [[3, 1, 0, 0]], [[0, 0, 2, 2]]
    assert summarise([record(expert_tokens=one) for _ in range(4)], two_groups, tokens=8)["rank_load"] == [2.0]
    mixed = [record(expert_tokens=tokens) for tokens in (one, two, one, one)]
    assert summarise(mixed, two_groups, tokens=8)["rank_load"] == pytest.approx([(1.0 + 2.0) / 2])


def test_offset_moves_every_time_to_the_first_ranks_clock() -> None:
    spans = [Span("other", 1.0, 5.0), Span("expert", 2.0, 3.0), Span(WAIT, 3.0, 4.0, message=END_OF_STEP)]
    made = rank_record(
        spans, {END_OF_STEP: 3.0}, 100.0,
        loss=0.0, aux_loss=0.0, grad_norm=0.0, peak_memory_bytes=0, rss_bytes=0, expert_tokens=[],
    )  # fmt: skip
    assert (made.start_s, made.end_s) == (101.0, 105.0)
    assert made.posts == {END_OF_STEP: 103.0} and made.waits == [(103.0, 104.0, END_OF_STEP)]
    assert made.seconds["expert"] == 1.0
