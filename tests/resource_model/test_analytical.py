"""Steps under fused kernels: kept bytes against published formulas, states, imbalance, bounds of time, intervals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.resource_model import ResourceModelError, analytical, schedule
from piper_hpc.resource_model.analytical import memory
from piper_hpc.resource_model.analytical.device import Device
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.spec import (
    DATA_SHEET,
    EXECUTIONS,
    RECIPES,
    TERMS,
    Accelerator,
    Calibration,
    ClusterSpec,
    Efficiency,
    Layout,
    Link,
    ModelSpec,
    Routing,
    Topology,
    Workload,
)

GPT = ModelSpec(
    "gpt", layers=8, hidden=1024, heads=16, kv_heads=16, head_dim=64, experts=0, top_k=0, expert_ffn=0, vocab=50_000,
    dense_ffn=4096, dense_matrices=2, positions=2048, norm="layer",
)  # fmt: skip
MOE = ModelSpec(
    "moe", layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, experts=32, top_k=4, expert_ffn=512, vocab=50_000
)
MEGATRON, OLD = EXECUTIONS["megatron"], EXECUTIONS["megatron_2022"]
DEVICE = Accelerator(
    "device",
    {"bfloat16": 1e15, "float32": 1e14},
    memory_bytes=80 * 10**9,
    memory_bytes_per_s=3e12,
    compute_units=132,
    efficiency=Efficiency(
        gemm=0.7, grouped_gemm=0.7, attention_forward=0.5, attention_backward=0.4, memory=0.85, launch_s=1e-5,
        link={"node": 0.8, "system": 0.9}, spread={"gemm": 0.1, "link.system": 0.2, "model": 0.03},
    ),
)  # fmt: skip
WORKLOAD = Workload(64, 2048, RECIPES["mixed_18"])


def cluster(ranks: int = 64) -> ClusterSpec:
    """Nodes of eight devices."""
    nodes = max(1, ranks // 8)
    links = {"node": Link(3e-6, 450e9), "system": Link(1e-5, 50e9)}
    sheet = Calibration(DATA_SHEET, "", 1e15)
    return ClusterSpec(
        "c", nodes, 8, (0,) * nodes, DEVICE.memory_bytes, sheet, topology=Topology(8), links=links, accelerator=DEVICE
    )


def evaluate(model: ModelSpec, layout: Layout, workload: Workload = WORKLOAD, execution=MEGATRON) -> analytical.Step:
    """The closed form."""
    return analytical.stepper(model, cluster(layout.ranks), layout, workload, execution).evaluate()


def kept(layout: Layout, *, sequence_parallel: bool) -> float:
    """Bytes that one GPT layer keeps of one micro-batch, with stored scores."""
    execution = replace(OLD, sequence_parallel=sequence_parallel)
    return memory.layer_bytes(Shapes(GPT, layout, WORKLOAD, sequence_parallel), execution, moe=False)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_gpt_layer_keeps_what_korthikanti_et_al_count(tp: int) -> None:
    """arXiv 2205.05198, Eq 1, 2 and 4 and Table 2; s tokens, b sequences, h hidden, a heads, t tensor parallel."""
    s, b, h, a, t = 2048, 2, GPT.hidden, GPT.heads, tp
    layout = Layout(tp=tp, etp=tp, micro_batch=b)
    scores = 5 * a * s / h
    # They take the two norms, the residual masks and both block inputs as not split: 10 s b h.
    assert kept(layout, sequence_parallel=False) == s * b * h * (10 + 24 / t + scores / t)
    assert kept(layout, sequence_parallel=True) == s * b * h / t * (34 + scores)
    selective = replace(layout, recompute="selective")
    assert kept(selective, sequence_parallel=True) == s * b * h * 34 / t
    full = replace(layout, recompute="full")
    assert kept(full, sequence_parallel=False) == 2 * s * b * h


@pytest.mark.parametrize(("zero", "bytes_each"), [(0, 18), (1, 6 + 12 / 4), (2, 2 + 16 / 4), (3, 18 / 4)])
def test_zero_shards_states_over_those_who_hold_the_same(zero: int, bytes_each: float) -> None:
    layout = Layout(dp=4, zero=zero)
    states = memory.state_bytes(Shapes(GPT, layout, WORKLOAD), memory.Parameters(1e9))
    assert sum(states.values()) == pytest.approx(bytes_each * 1e9)


def test_experts_are_sharded_over_their_own_replicas() -> None:
    layout = Layout(ep=8, dp=2, zero=1)
    states = memory.state_bytes(Shapes(MOE, layout, WORKLOAD), memory.Parameters(1e9, 1e9))
    assert states["optimizer"] == pytest.approx(12e9 / 16 + 12e9 / 2)


def _state_bytes(model: ModelSpec, layout: Layout) -> float:
    step = evaluate(model, layout)
    kinds = ("parameters", "gradients", "optimizer")
    return max(sum(float(step.memory[kind][rank]) for kind in kinds) for rank in range(layout.pp))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([GPT, MOE]),
    st.sampled_from(["pp", "dp", "ep", "tp", "cp"]),
    st.integers(0, 3),
    st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])),
)
def test_more_gpus_never_raise_the_states_of_a_rank(
    model: ModelSpec, axis: str, zero: int, degrees: tuple[int, int, int]
) -> None:
    pp, dp, ep = degrees
    ep = ep if model.experts else 1
    before = Layout(pp=pp, dp=dp, ep=ep, zero=zero)
    if axis == "ep" and not model.experts:
        axis = "dp"
    # tp and cp take ranks of their own here: replicas of experts grow with them.
    changed = {axis: 2 * getattr(before, axis)} | ({"dp": 2 * dp} if axis in ("tp", "cp") else {})
    assert _state_bytes(model, replace(before, **changed)) <= _state_bytes(model, before) * (1 + 1e-12)


@pytest.mark.parametrize("model", [GPT, MOE])
@pytest.mark.parametrize("pp", [1, 4])
def test_terms_add_up_and_one_stage_has_no_bubble(model: ModelSpec, pp: int) -> None:
    step = evaluate(model, Layout(pp=pp, ep=4 if model.experts else 1, dp=2 if model.experts else 8))
    assert set(step.terms) <= set(TERMS)
    assert sum(map(float, step.terms.values())) == pytest.approx(float(step.step_time_s))
    waits = float(step.terms["bubble_s"]) + float(step.terms["p2p_s"])
    assert waits == 0 if pp == 1 else waits > 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10**5), st.integers(64, 10**4), st.integers(64, 10**4))
def test_no_product_beats_the_peak_or_the_memory(rows: int, inputs: int, outputs: int) -> None:
    times = Device(DEVICE, RECIPES["mixed_18"]).linear(rows, inputs, outputs)
    flops = 2 * rows * inputs * outputs
    moved = 2 * (rows * (inputs + outputs) + inputs * outputs)
    assert float(times.forward) >= max(flops / (0.7 * 1e15), moved / 3e12)
    assert float(times.backward) >= 2 * flops / (0.7 * 1e15) * (1 - 1e-12)


def test_a_hot_rank_computes_waits_and_keeps_more_unless_its_load_is_capped() -> None:
    layout = Layout(ep=8)

    def step(routing: Routing) -> analytical.Step:
        return evaluate(MOE, layout, replace(WORKLOAD, routing=routing))

    even, hot = step(Routing()), step(Routing(imbalance=2.0))
    for term in ("expert_s", "dispatch_s", "combine_s"):
        assert hot.terms[term] > 1.2 * even.terms[term]
    assert hot.memory["activations"][0] > even.memory["activations"][0]
    assert step(Routing("forced", imbalance=2.0)).step_time_s == even.step_time_s
    assert step(Routing("drop", capacity_factor=1.0, imbalance=2.0)).step_time_s == even.step_time_s
    assert step(Routing("drop", capacity_factor=1.25)).terms["expert_s"] > even.terms["expert_s"]


def test_a_histogram_sets_the_load_of_the_busiest_rank() -> None:
    routing = Routing(histogram=(4.0, 2.0, 1.0, 1.0))
    assert routing.load(1) == 1
    assert routing.load([2, 4]).tolist() == [1.5, 2.0]


@pytest.mark.parametrize("recompute", ["selective", "full", "moe", "norm+activation"])
def test_recomputing_costs_time_and_saves_memory(recompute: str) -> None:
    layout, execution = Layout(ep=8), replace(MEGATRON, flash=False)
    plain, again = (
        evaluate(MOE, replace(layout, recompute=choice), execution=execution) for choice in ("none", recompute)
    )
    assert again.step_time_s > plain.step_time_s
    assert again.memory["activations"][0] < plain.memory["activations"][0]


def test_gradients_are_reduced_over_all_who_hold_the_same() -> None:
    """Context-parallel ranks hold copies too: the same ranks cost the same, however they are named."""
    by_data, by_context = (
        evaluate(GPT, layout, execution=replace(MEGATRON, overlap_grads=False))
        for layout in (Layout(dp=16), Layout(dp=16, cp=16))
    )
    assert by_context.terms["grad_reduce_s"] == pytest.approx(float(by_data.terms["grad_reduce_s"]))


def test_sharded_gradients_cost_an_exchange_for_every_micro_batch() -> None:
    execution = replace(MEGATRON, overlap_grads=False)
    costs = [
        float(evaluate(GPT, Layout(dp=8, zero=zero), execution=execution).terms["grad_reduce_s"]) for zero in range(4)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=0.6)
    assert costs[2] > 4 * costs[1]
    assert costs[3] > costs[2]


def test_what_is_computed_again_is_held_for_a_while() -> None:
    plain, moe, full = (
        evaluate(MOE, Layout(ep=8, micro_batch=4, recompute=choice)).memory["workspace"][0]
        for choice in ("none", "moe", "full")
    )
    assert plain <= moe <= full


def test_zero_3_holds_whole_layers_for_a_while() -> None:
    layout = Layout(dp=8, zero=3)
    per_layer = memory.layer_parameters(Shapes(GPT, layout, WORKLOAD), moe=False).dense
    assert evaluate(GPT, layout).memory["gathered"][0] == pytest.approx(per_layer * (2 * 2 + 4))
    assert evaluate(GPT, replace(layout, zero=2)).memory["gathered"][0] == 0


def test_overlapped_exchanges_are_hidden_not_forgotten() -> None:
    layout = Layout(pp=2, ep=16, dp=2)
    exposed = evaluate(MOE, layout)
    beside = evaluate(MOE, layout, execution=replace(MEGATRON, overlap_experts=True))
    for term in ("dispatch_s", "combine_s"):
        assert beside.terms[term] < exposed.terms[term]
        assert beside.terms[term] + beside.hidden[term] == pytest.approx(float(exposed.terms[term]))


def test_a_whole_prediction_plays_the_schedule_and_carries_intervals() -> None:
    layout = Layout(pp=4, ep=4, dp=2, schedule="1f1b")
    predicted = analytical.predict(MOE, cluster(32), layout, WORKLOAD, MEGATRON)
    closed = evaluate(MOE, layout)
    assert sum(predicted.terms.values()) == pytest.approx(predicted.step_time_s)
    assert predicted.step_time_s == pytest.approx(float(closed.step_time_s), rel=0.05)
    low, high = predicted.intervals["step_time_s"]
    assert low < predicted.step_time_s < high
    # The gemm's 10 %, the network's 20 % of what they carry, and the fit's 3 % of all of it.
    assert 1.03 < high / predicted.step_time_s < 1.2
    assert len(predicted.peak_memory_bytes) == layout.ranks
    assert 0 < predicted.mfu < 1


def test_a_workload_beyond_what_was_measured_is_told() -> None:
    short = Workload(64, 256, RECIPES["mixed_18"])
    notes = " ".join(analytical.predict(MOE, cluster(8), Layout(ep=8), short, MEGATRON).notes)
    assert "sequence=256" in notes
    assert "128 rows each" not in notes and "experts: " not in notes
    skinny = analytical.predict(replace(MOE, top_k=1), cluster(8), Layout(ep=8), short, MEGATRON).notes
    assert any("experts: 64 rows each" in note for note in skinny)
    assert not analytical.predict(MOE, cluster(8), Layout(ep=8), WORKLOAD, MEGATRON).notes


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(ep=5, dp=8), "Eq 8"),
        (Layout(pp=16, dp=2), "Eq 9"),
        (Layout(dp=128), "128 ranks"),
        (Layout(dp=8, zero=7), "zero = 7"),
        (Layout(dp=8, all_to_all="ring"), "all_to_all = 'ring'"),
        (Layout(dp=8, recompute="everything"), "recompute = 'everything'"),
        (Layout(tp=3, etp=3, dp=2), "tp must divide the heads"),
        (Layout(dp=8, micro_batch=3), "batch"),
        (Layout(pp=4, ep=4, dp=2, vpp=2), "1f1b"),
    ],
)
def test_what_is_no_layout_is_refused_with_the_rule(layout: Layout, said: str) -> None:
    with pytest.raises(ResourceModelError, match=said):
        analytical.predict(MOE, cluster(64), layout, WORKLOAD, MEGATRON)


def test_the_bubble_of_equal_stages_is_the_closed_form() -> None:
    model = replace(GPT, vocab=64, positions=0)  # ends that weigh nothing: stages are equal
    layout = Layout(pp=4, dp=2)
    step = evaluate(model, layout)
    timeline = analytical.simulate(step, layout, MEGATRON)
    assert timeline is not None
    fraction = schedule.bubble_fraction("1f1b", 4, 1, 32, schedule.Work(1.0, 1.0, 1.0))
    busy, idle = max(timeline.busy_s), float(step.terms["bubble_s"])
    assert idle / (busy + idle) == pytest.approx(fraction, rel=0.06)  # the ends weigh a little


def test_arrays_of_layouts_give_what_each_layout_gives() -> None:
    class Grid:
        pp, vpp, schedule, all_to_all, placement = 1, 1, "1f1b", "flat", "linear"
        etp, tp, cp, zero = 1, 1, 1, 1
        ep = np.array([[1], [4], [8]])
        micro_batch = np.array([[1, 2]])
        dp = 8 // ep
        dense_dp = 8
        recomputed = Layout().recomputed

    whole = analytical.stepper(MOE, cluster(8), Grid(), WORKLOAD, MEGATRON).evaluate()
    times = np.broadcast_to(whole.step_time_s, (3, 2))
    for row, ep in enumerate((1, 4, 8)):
        for column, micro_batch in enumerate((1, 2)):
            one = evaluate(MOE, Layout(ep=ep, dp=8 // ep, zero=1, micro_batch=micro_batch))
            assert math.isclose(times[row, column], float(one.step_time_s), rel_tol=1e-12)
