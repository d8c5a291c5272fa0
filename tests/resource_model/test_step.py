"""The step of every schedule, ZeRO stage, recomputation and split, against small cases counted by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from operator import attrgetter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.compute import ModuleCost
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import seconds_at
from piper_hpc.resource_model.eager.groups import layout_groups
from piper_hpc.resource_model.eager.layer import Work
from piper_hpc.resource_model.eager.pipeline import held_chunks, most_alive
from piper_hpc.resource_model.eager.predict import step_lower_bound_s, step_time_s
from piper_hpc.resource_model.eager.step import StepCost, step_cost
from piper_hpc.resource_model.flops import score_flops
from piper_hpc.resource_model.schedule import peak_held, rank_order
from piper_hpc.spec import TERMS, TRAINED, Calibration, ClusterSpec, Curve, Layout, Workload
from piper_hpc.spec.executor import LAYOUT_AXES, trains
from piper_hpc.spec.schedules import SCHEDULES, schedule_problem
from tests.resource_model.clusters import TINY, calibration, cluster, line

TOKENS = 128
PEAK = 50e9
TWO = replace(TINY, layers=2)
BOTH_WAYS = attrgetter("forward_s"), attrgetter("backward_s")
BEFORE_DISPATCH = "router_s", "attention_s"
PARTS_OF_AN_EXPERT = 2 * TOKENS * TINY.top_k * TINY.hidden * TINY.expert_ffn
"""FLOPs of one of the three products of the experts of a layer, one sequence."""


def only(*rates: tuple[str, float]) -> ClusterSpec:
    """A cluster on which these operators have a rate and no latency, products run at PEAK, and all else is free."""
    work = (1.0, 1e12)
    curves = {name: Curve(name, "", work, tuple(each / rate for each in work), (0.0, 0.0)) for name, rate in rates}
    return cluster(Calibration("made up", "2026-01-01T00:00:00+00:00", PEAK, curves))


def workload(micro_batches: int, replicas: int = 1) -> Workload:
    return Workload(micro_batches * replicas, TOKENS)


def test_zb_h1_by_hand() -> None:
    """Two ranks of one layer, two micro-batches. The first has no input gradient: its W is the whole backward."""
    layout, prompt = Layout(pp=2, schedule="zb_h1"), cluster(calibration("skew/node/2", "skew/rack/4"))
    cost = step_cost(TWO, prompt, layout, workload(2))
    first, last = cost.stages
    (message,) = (each.seconds for each in cost.messages)
    f0, b0, f1, w1 = first.forward_s, first.backward_s, last.forward_s, last.weight_s
    i1 = last.backward_s + last.split.backward.seconds - w1
    assert first.weight_s == b0 and 0 < w1 < last.backward_s
    assert first.split == ModuleCost(Cost(), Cost()) and last.split.backward.seconds > last.split.weight.seconds > 0
    down = f0 + message  # the last rank: F0 I0 F1 I1 W0 W1
    i1_of_0 = down + f1 + i1
    i1_of_1 = max(i1_of_0, 2 * f0 + message) + f1 + i1
    end_last = i1_of_1 + 2 * w1
    w0_of_0 = max(2 * f0, i1_of_0 + message) + b0  # the first rank: F0 F1 I0 W0 I1 W1, where I takes no time
    end_first = max(w0_of_0, i1_of_1 + message) + b0
    ranks = cost.ranks
    arrival = max(end_first + ranks[0].before_norm_s, end_last + ranks[1].before_norm_s)
    expected = arrival + max(rank.update.after_norm_s for rank in ranks)
    prediction = predict(TWO, prompt, layout, workload(2))
    assert prediction.step_time_s == pytest.approx(expected, rel=1e-12)
    assert sum(prediction.terms.values()) == pytest.approx(expected, rel=1e-12)
    whole = predict(TWO, prompt, replace(layout, schedule="1f1b"), workload(2))
    assert whole.terms["weight_grad_s"] == 0.0 < prediction.terms["weight_grad_s"]
    assert prediction.step_time_s < whole.step_time_s


def test_weight_gradients_are_one_product_of_each_matrix() -> None:
    """The last rank of two: a layer's matrices and the head, each once for its weight; scores have none."""
    where = only(("p2p/node", 1e12), ("p2p/system", 1e12))
    layout, batch = Layout(pp=2, schedule="zb_h1"), workload(4)
    split = predict(TWO, where, layout, batch).terms
    whole = predict(TWO, where, replace(layout, schedule="1f1b"), batch).terms
    matrices = 2 * TINY.hidden * TINY.q_dim + 2 * TINY.hidden * TINY.kv_dim + TINY.hidden * TINY.experts
    flops = 2 * TOKENS * (matrices + TINY.hidden * TINY.vocab) + 3 * PARTS_OF_AN_EXPERT
    assert split["weight_grad_s"] == pytest.approx(4 * flops / PEAK)
    apart = {term: whole[term] - split[term] for term in ("attention_s", "router_s", "expert_s", "head_s")}
    assert apart["expert_s"] == pytest.approx(4 * 3 * PARTS_OF_AN_EXPERT / PEAK)
    assert sum(apart.values()) == pytest.approx(split["weight_grad_s"])


def test_dualpipev_splits_some_backwards_and_the_others_stay_whole() -> None:
    layout, batch = Layout(pp=2, vpp=2, schedule="dualpipev"), workload(8)
    order = rank_order("dualpipev", 1, 2, 2, 8)
    late = [sum(action.kind == "W" and action.chunk == chunk for action in order) for chunk in (0, 1)]
    assert min(late) > 0 and max(late) < 8
    cost = step_cost(TINY, cluster(), layout, batch)
    terms = cost.ranks[1].terms(8, late)
    expected = sum(chunk.weight_s * count for chunk, count in zip(cost.ranks[1].chunks, late, strict=True))
    assert terms["weight_grad_s"].seconds == pytest.approx(expected)
    assert sum(term.seconds for term in terms.values()) == pytest.approx(cost.busy_s[1])


def test_recomputation_by_hand() -> None:
    """Products alone have a price: a backward is two forwards, and what is recomputed one more."""
    batch = workload(4)

    def terms(recompute: str, *rates: tuple[str, float]) -> dict[str, float]:
        return predict(TINY, only(*rates), Layout(recompute=recompute), batch).terms

    none, full = terms("none"), terms("full")
    assert full["expert_s"] == pytest.approx(none["expert_s"] * 4 / 3)
    scores = 4 * TINY.layers * TOKENS * score_flops(TINY, TOKENS) / PEAK
    for name in ("selective", "attention"):
        assert terms(name)["attention_s"] - none["attention_s"] == pytest.approx(scores)
    gated = ("activation", 1e9)  # the sigmoid-weighted half: read and written once
    inner_bytes = 4 * TINY.layers * TOKENS * TINY.top_k * TINY.expert_ffn * 4
    added = terms("activation", gated)["expert_s"] - terms("none", gated)["expert_s"]
    assert added == pytest.approx(2 * inner_bytes / 1e9)
    both = terms("attention+activation", gated)
    assert both["attention_s"] == pytest.approx(terms("attention", gated)["attention_s"])
    assert both["expert_s"] == pytest.approx(terms("activation", gated)["expert_s"])


def test_full_recomputation_adds_the_forward_of_every_layer_and_its_exchanges() -> None:
    layout, batch = Layout(ep=2), workload(4, replicas=2)
    none, full = (predict(TINY, cluster(), replace(layout, recompute=name), batch) for name in ("none", "full"))
    cost = step_cost(TINY, cluster(), layout, batch)
    (layer,) = {id(each): each for rank in cost.ranks for chunk in rank.chunks for each, _ in chunk.layers}.values()
    for term, module in layer.modules.items():
        added = full.terms[term] - none.terms[term]
        assert added == pytest.approx(4 * TINY.layers * module.forward.seconds, abs=1e-12)
    assert full.terms["head_s"] == none.terms["head_s"]
    sent = [sum(one.exchange["payload_bytes"].values()) for one in (none, full)]
    assert sent[1] == pytest.approx(sent[0] * 6 / 4)


def test_zero_1_by_hand() -> None:
    """Four replicas: gradients copied three times, sent as shards, added; a quarter updated; weights gathered by a ring
    of three messages, and copied twice."""
    links = (("all_to_all/rack/4", 1e9), ("all_reduce/rack/4", 1e9), ("p2p/rack", 1e9), ("p2p/node", 1e9))
    where, batch = only(*links, ("adamw", 1e9)), workload(1, replicas=4)
    terms = [predict(TINY, where, Layout(dp=4, zero=zero), batch).terms for zero in (0, 1)]
    held = TINY.parameters
    streamed = 1 / (7 * 4) / 1e9  # a byte of a streaming operation costs what AdamW's seven values do
    assert terms[0]["grad_reduce_s"] == pytest.approx(4 * held / 1e9, rel=1e-5)
    gathered = 3 * held * 4 / 4 / 1e9
    sent = 4 * held / 1e9 + 4 * held * (6 + 1.25) * streamed
    assert terms[1]["grad_reduce_s"] == pytest.approx(sent + gathered + 4 * held * 4 * streamed, rel=1e-5)
    update = held / 1e9 + 3 * 4 * held * streamed  # norm reads, clipping reads and writes
    assert terms[0]["optimizer_s"] == pytest.approx(update)
    assert terms[1]["optimizer_s"] == pytest.approx(update / 4)


@pytest.mark.parametrize(
    ("layout", "since"),
    [
        (Layout(dp=4), lambda cost: 2 * sum(TINY.layers * way(cost) for way in BOTH_WAYS)),
        (Layout(pp=2, dp=2), lambda cost: TINY.layers / 2 * cost.backward_s),
        (Layout(ep=2, dp=2), lambda cost: sum(cost.modules[term].backward.seconds for term in BEFORE_DISPATCH)),
    ],
    ids=["the whole step", "since a message between stages", "since the last exchange of rows"],
)
def test_who_met_long_ago_waits_longer_for_the_reduction(layout: Layout, since: Callable[[Work], float]) -> None:
    first, *_ = step_cost(TINY, cluster(), layout, workload(2, replicas=layout.ranks // layout.pp)).ranks
    ((layer, _),) = first.chunks[0].layers
    size = layout.ranks // layout.pp
    curve = f"skew/{'rack' if size == 4 else 'node'}/{size}"
    assert first.reduce_wait.seconds == pytest.approx(seconds_at(line(curve), since(layer)))


def test_bf16_reduces_and_updates_in_fp32() -> None:
    """Gradients of four bytes, AdamW of values twice as wide as those measured, and the cast of the masters."""
    where = only(("all_reduce/rack/4", 1e9), ("adamw", 1e9), ("elementwise", 1e10), ("p2p/rack", 1e9))
    batch = replace(workload(1, replicas=4), recipe=TRAINED["bfloat16"])
    terms, held = predict(TINY, where, Layout(dp=4), batch).terms, TINY.parameters
    assert terms["grad_reduce_s"] == pytest.approx(4 * held / 1e9, rel=1e-5)
    assert terms["optimizer_s"] == pytest.approx(2 * held / 1e9 + (3 * 4 + 4 + 2) * held / 1e10)


def test_chunks_of_a_rank_meet_without_a_message_and_interleaved_ones_come_round() -> None:
    def tiers(schedule: str) -> tuple[str | None, ...]:
        return layout_groups(Layout(pp=4, vpp=2, schedule=schedule, dp=2), cluster()).boundaries

    # Two ranks a node, two nodes a rack: partners of pipeline ranks 1 and 2, and of 3 and 0, are in two racks.
    assert tiers("zbv") == ("rack", "system", "rack", None, "rack", "system", "rack")
    assert tiers("interleaved") == ("rack", "system", "rack", "system", "rack", "system", "rack")


@pytest.mark.parametrize(
    ("schedule", "vpp", "ends"),
    # Of each pipeline rank the boundaries of its chunks: nodes are one rank each, all links are of tier rack.
    [("1f1b", 1, (1, 2, 2, 1)), ("interleaved", 2, (3, 4, 4, 3)), ("zbv", 2, (2, 4, 4, 2))],
)
def test_every_end_of_a_message_costs_its_rank_compute(schedule: str, vpp: int, ends: tuple[int, ...]) -> None:
    deep, batch, layout = replace(TINY, layers=8), workload(8), Layout(pp=4, vpp=vpp, schedule=schedule)

    def busy_s(*without: str) -> tuple[float, ...]:
        where = replace(cluster(calibration(*without), nodes=4, ranks_per_node=1), rack_of_node=(0, 0, 0, 0))
        return step_cost(deep, where, layout, batch).busy_s

    charged, free = busy_s(), busy_s("overhead/node", "overhead/rack")
    one_s = seconds_at(line("overhead/rack"), TOKENS * TINY.hidden * 4)
    # Over every boundary one message in forward and one in backward, of each micro-batch.
    assert [a - b for a, b in zip(charged, free, strict=True)] == pytest.approx([2 * 8 * one_s * n for n in ends])


def test_an_uneven_split_moves_work_between_ranks() -> None:
    deep, batch = replace(TINY, layers=8), workload(8)
    even, uneven = (step_cost(deep, cluster(), Layout(pp=2, stage_layers=split), batch) for split in ((), (5, 3)))
    layer = even.ranks[0].chunks[0].layers[0][0]
    moved = 8 * (layer.forward_s + layer.backward_s)
    work = [[8 * sum(chunk.forward_s + chunk.backward_s for chunk in rank.chunks) for rank in each.ranks]
            for each in (even, uneven)]  # fmt: skip
    assert work[1][0] - work[0][0] == pytest.approx(moved) == pytest.approx(work[0][1] - work[1][1])


@st.composite
def trained(draw: st.DrawFn) -> tuple[Layout, int]:
    """Any layout that trains on eight layers, and its micro-batches."""
    pp, vpp = draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (2, 4), (8, 1)]))
    micro_batches = draw(st.integers(1, 12))
    runs = [name for name in SCHEDULES if schedule_problem(name, pp, vpp, micro_batches) is None]
    if not runs:
        return Layout(), micro_batches
    layout = Layout(
        pp=pp,
        vpp=vpp,
        dp=draw(st.sampled_from([1, 8 // pp])),
        zero=draw(st.sampled_from([0, 1])),
        schedule=draw(st.sampled_from(runs)),
        recompute=draw(st.sampled_from(LAYOUT_AXES["recompute"])),
    )
    return layout if trains(layout) else replace(layout, recompute="none"), micro_batches


@given(trained())
def test_terms_of_every_trained_layout_add_up_and_no_step_beats_its_bound(given_layout: tuple[Layout, int]) -> None:
    layout, micro_batches = given_layout
    deep, batch = replace(TINY, layers=8), workload(micro_batches, layout.dense_dp)
    for where in (cluster(), replace(cluster(), devices_share_cores=True, cores=2.0)):
        cost: StepCost = step_cost(deep, where, layout, batch)
        prediction = predict(deep, where, layout, batch)
        assert set(prediction.terms) == set(TERMS)
        assert all(seconds >= 0 for seconds in prediction.terms.values())
        assert prediction.step_time_s == step_time_s(cost, where)
        assert prediction.step_time_s >= step_lower_bound_s(cost, where) * (1 - 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_alive_is_what_the_order_holds(schedule: str) -> None:
    """For any sizes of the chunks the fullest of the listed moments is the peak of the order."""
    for pp, vpp, micro_batches in product((1, 2, 4), (1, 2, 3), (1, 2, 4, 8, 12)):
        if schedule_problem(schedule, pp, vpp, micro_batches) is not None:
            continue
        for rank, sizes in product(range(pp), ((1, 1, 1), (1, 5, 2), (7, 1, 1))):
            moments = most_alive(schedule, rank, pp, vpp, micro_batches)
            fullest = max(sum(n * size for n, size in zip(alive[:vpp], sizes, strict=False)) for alive in moments)
            assert fullest == peak_held(rank_order(schedule, rank, pp, vpp, micro_batches), sizes[:vpp])


def test_a_rank_holds_the_stages_of_its_schedule() -> None:
    chunks = held_chunks(Layout(pp=2, vpp=2, schedule="zbv", stage_layers=(1, 2, 3, 4)), replace(TINY, layers=10))
    assert [[(each.layers, each.first, each.last) for each in of_rank] for of_rank in chunks] == [
        [(1, True, False), (4, False, True)],
        [(2, False, False), (3, False, False)],
    ]
