"""The whole prediction: its sums, what it rests on, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.resource_model import FLOP_CONVENTION, ResourceModelError, flops_per_token, predict
from piper_hpc.resource_model.eager.predict import TERM_ERROR, step_lower_bound_s
from piper_hpc.resource_model.eager.step import step_cost
from piper_hpc.spec import (
    DATA_SHEET,
    IDLE,
    TERMS,
    Calibration,
    ClusterSpec,
    Curve,
    Layout,
    ModelSpec,
    Prediction,
    Routing,
    Workload,
)
from tests.resource_model.clusters import TINY, UNITS, WIDE, calibration, cluster, slower

WORKLOAD = Workload(global_batch=32, sequence=128)
LAYOUT = Layout(pp=2, ep=2, dp=2, micro_batch=2)
WAITS = {"bubble_s"}
"""Waiting rests on the work of every other stage."""


def run(model: ModelSpec = TINY, given_cluster: ClusterSpec | None = None, layout: Layout = LAYOUT) -> Prediction:
    return predict(model, given_cluster or cluster(), layout, WORKLOAD)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    pp, ep, dp = (draw(st.sampled_from(degrees)) for degrees in ([1, 2, 4], [1, 2, 4], [1, 2]))
    layout = Layout(pp=pp, ep=ep, dp=dp)
    share = WORKLOAD.global_batch // layout.dense_dp
    micro_batch = draw(st.sampled_from([size for size in (1, 2, 4, 8) if share % size == 0 and share // size >= pp]))
    return replace(layout, micro_batch=micro_batch)


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([TINY, WIDE]), st.booleans())
def test_terms_add_up_and_no_layout_beats_its_busiest_stage(layout: Layout, model: ModelSpec, shared: bool) -> None:
    where = replace(cluster(nodes=64, ranks_per_node=1), devices_share_cores=shared, cores=2.0)
    prediction = run(model, where, layout)
    assert set(prediction.terms) == set(TERMS)
    assert all(seconds >= 0 for seconds in prediction.terms.values())
    assert sum(prediction.terms.values()) == pytest.approx(prediction.step_time_s, rel=1e-12)
    assert prediction.terms["other_s"] > 0  # autograd between modules
    bound = step_lower_bound_s(step_cost(model, where, layout, WORKLOAD), where)
    assert prediction.step_time_s >= bound * (1 - 1e-9)


def test_rates_follow_from_the_step() -> None:
    prediction = run()
    assert prediction.tokens_per_s == pytest.approx(32 * 128 / prediction.step_time_s)
    flops = flops_per_token(TINY, 128) * 32 * 128
    assert prediction.mfu == pytest.approx(flops / (50e9 * 8 * prediction.step_time_s))
    assert prediction.model["flop_convention"] == FLOP_CONVENTION
    assert prediction.bubble_fraction == pytest.approx(prediction.terms["bubble_s"] / prediction.step_time_s)


def test_the_document_is_json_with_the_names_of_the_contract() -> None:
    document = json.loads(json.dumps(run().document(), allow_nan=False))
    contract = (
        "layout step_time_s tokens_per_s mfu peak_memory_bytes bubble_fraction terms hidden intervals memory model "
        "calibration"
    )
    assert set(contract.split()) <= set(document)
    assert len(document["peak_memory_bytes"]) == 8
    assert {"parameters", "active_parameters", "flops_per_token"} <= set(document["model"])


@pytest.mark.parametrize("name", sorted(UNITS))
def test_a_slower_curve_moves_the_terms_that_rest_on_it_and_no_other(name: str) -> None:
    before, after = run(), run(given_cluster=cluster(slower(calibration(), name)))
    rests_on = before.calibration["rests_on"]
    for term in TERMS:
        if name.startswith(IDLE):
            # Rows that are longer under way hide more of how late other ranks of their exchange are.
            meets = term in {"dispatch_s", "combine_s"} and name == "idle/all_to_all/node/2"
            assert term in WAITS or (after.terms[term] < before.terms[term] if meets else
                                     after.terms[term] == before.terms[term])  # fmt: skip
        elif name in rests_on.get(term, []):
            assert term in WAITS or after.terms[term] > before.terms[term]
        else:
            assert after.terms[term] == before.terms[term]


def test_each_term_rests_on_the_operators_it_does() -> None:
    rests_on = run().calibration["rests_on"]
    assert rests_on["expert_s"] == ["activation", "elementwise", "grouped_gemm/64", "host_op"]
    assert rests_on["router_s"] == ["elementwise", "gemm", "host_op", "norm", "router"]
    compute = ["attention_backward", "attention_forward", "elementwise", "gemm", "host_op", "norm"]
    assert rests_on["attention_s"] == compute
    # A message waits for the Python that its sender goes on with.
    assert rests_on["p2p_s"] == ["host_op", "p2p/system", "skew/node/2"]
    for term in ("dispatch_s", "combine_s"):
        assert {"all_to_all/node/2", "skew/node/2"} <= set(rests_on[term])
        # What decides how long ranks wait for one another is what they computed before.
        assert {"attention_forward", "grouped_gemm/64"} & set(rests_on[term])
    assert rests_on["optimizer_s"] == ["adamw", "elementwise"]


def test_skew_is_waited_for_where_ranks_meet_and_nowhere_else() -> None:
    before, after = run(), run(given_cluster=cluster(slower(calibration(), "skew/node/2")))
    moved = {term for term in TERMS if after.terms[term] != before.terms[term]}
    assert moved == {"dispatch_s", "combine_s", "p2p_s", "bubble_s"}


def test_hand_count_of_skew() -> None:
    # A curve of 1 ms whatever was computed, 2 layers and 4 micro-batches: a dispatch meets twice in forward.
    idle = "idle/all_to_all/node/2"
    flat = replace(calibration().curves["skew/node/2"], seconds=(1e-3,) * 7)
    skewed = calibration(idle).curves | {"skew/node/2": flat}
    without = run(given_cluster=cluster(calibration("skew/node/2", "skew/rack/4")))

    def waited(curves: Mapping[str, Curve]) -> list[float]:
        """Meetings in dispatch and in combine that are waited for."""
        prediction = run(given_cluster=cluster(replace(calibration(), curves=curves)))
        per_meeting_s = 2 * 4 * 1e-3
        return [(prediction.terms[term] - without.terms[term]) / per_meeting_s for term in ("dispatch_s", "combine_s")]

    assert waited(skewed) == pytest.approx([3, 2], rel=1e-3)
    # Where rows are under way for longer than ranks are late, those meet unhidden where they say how many will come.
    long = slower(calibration(), idle, 100).curves[idle]
    assert waited(skewed | {idle: long}) == pytest.approx([1, 0], abs=2e-3)
    assert any(note.startswith("skew: not measured") for note in without.notes)
    assert not any("skew" in curve for curves in without.calibration["rests_on"].values() for curve in curves)


def test_ranks_that_share_cores_are_charged_no_skew() -> None:
    def shared(given: Calibration) -> Prediction:
        return run(given_cluster=replace(cluster(given), devices_share_cores=True, cores=2.0))

    assert shared(calibration()).terms == shared(calibration("skew/node/2", "skew/rack/4")).terms
    assert any(note.startswith("skew: not charged") for note in shared(calibration()).notes)


def test_ranks_wait_for_the_busiest_of_their_expert_group() -> None:
    balanced = run()
    routed = predict(TINY, cluster(), LAYOUT, replace(WORKLOAD, routing=Routing(imbalance=1.5)))
    moved = {term for term in TERMS if routed.terms[term] > balanced.terms[term]}
    assert moved == {"dispatch_s", "combine_s", "bubble_s"}, "the mean rank computes as much, and waits"
    # The busiest rank's extra experts are waited for at the combine in forward, at the dispatch in backward.
    waited = sum(routed.terms[term] - balanced.terms[term] for term in ("dispatch_s", "combine_s"))
    assert waited > 0.4 * balanced.terms["expert_s"]
    assert routed.step_time_s > balanced.step_time_s
    assert max(routed.peak_memory_bytes) > max(balanced.peak_memory_bytes)


def test_hand_count_of_a_layer_of_experts() -> None:
    # Three grouped GEMMs of 2 * 256 * 2 * 128 * 128 FLOPs forward and six backward, 2 layers, 4 micro-batches.
    only = Calibration(
        "made up", "2026-01-01T00:00:00+00:00", 50e9, {"grouped_gemm/64": calibration().curves["grouped_gemm/64"]}
    )
    with_links = replace(only, curves=only.curves | {"p2p/node": calibration().curves["p2p/node"]})
    prediction = run(given_cluster=cluster(with_links))
    one = 1e-5 + 2 * 512 * 128 * 128 / 40e9
    assert prediction.terms["expert_s"] == pytest.approx(9 * 2 * 4 * one, rel=0.02)


def test_a_single_stage_has_no_bubble_and_no_messages() -> None:
    terms = run(layout=Layout(ep=2, dp=4, micro_batch=2)).terms
    assert terms["bubble_s"] == pytest.approx(0.0, abs=1e-12)
    assert terms["p2p_s"] == 0.0


def test_more_micro_batches_shrink_the_bubble() -> None:
    fractions = [
        predict(TINY, cluster(), LAYOUT, Workload(batch, 128)).bubble_fraction or 0.0 for batch in (32, 64, 128)
    ]
    assert fractions[0] > fractions[1] > fractions[2] > 0


def test_intervals_hold_the_prediction_and_grow_with_the_spread() -> None:
    prediction = run()
    for name, (low, high) in prediction.intervals.items():
        value = prediction.terms[name] if name in prediction.terms else getattr(prediction, name)
        assert low <= value <= high
    assert set(prediction.intervals) == set(TERMS) | {"step_time_s", "tokens_per_s", "mfu"}
    exact = calibration()
    exact = replace(
        exact,
        curves={name: replace(curve, spread=(0.0,) * len(curve.work)) for name, curve in exact.curves.items()},
    )
    sure = run(given_cluster=cluster(exact))
    for term, seconds in sure.terms.items():
        assert sure.intervals[term] == pytest.approx((seconds / (1 + TERM_ERROR), seconds * (1 + TERM_ERROR)))
    # Terms are off one by one.
    together_s = math.hypot(*(TERM_ERROR * seconds for seconds in sure.terms.values()))
    assert sure.intervals["step_time_s"][1] == pytest.approx(sure.step_time_s + together_s)
    assert sure.intervals["step_time_s"][1] < prediction.intervals["step_time_s"][1]


def test_ranks_that_share_cores_are_bound_by_all_work() -> None:
    four = cluster(nodes=1, ranks_per_node=4)
    layout = Layout(pp=2, ep=2, micro_batch=2)
    devices = run(given_cluster=four, layout=layout)
    shared = run(given_cluster=replace(four, devices_share_cores=True, cores=2.0), layout=layout)
    assert shared.bubble_fraction is None
    assert shared.terms["bubble_s"] == 0.0
    assert any("not applicable" in note for note in shared.notes)
    # Measured with four ranks at work on two cores, each rank's curves hold a contention of two. A waiting stage lends
    # its core, so the step is at most what devices of that speed need, and at least what the busiest would alone.
    assert devices.step_time_s / 2 <= shared.step_time_s <= devices.step_time_s
    busy = 4 * devices.step_time_s * (1 - (devices.bubble_fraction or 0.0))
    assert shared.step_time_s <= busy / 4 * (1 + 1e-9)


def test_expert_groups_beyond_one_switch_are_marked() -> None:
    inside, beyond = (run(layout=Layout(pp=8 // (ep * dp), ep=ep, dp=dp)) for ep, dp in ((4, 1), (8, 1)))
    assert not any("Eq 10" in note for note in inside.notes)
    assert any(note.startswith("ep=8: expert groups reach beyond one switch") for note in beyond.notes)


def test_shared_cores_need_their_number() -> None:
    with pytest.raises(ResourceModelError, match="give the number of cores"):
        run(given_cluster=replace(cluster(), devices_share_cores=True))


def test_a_data_sheet_says_that_it_is_one() -> None:
    sheet = replace(calibration(), source=DATA_SHEET)
    prediction = run(given_cluster=cluster(sheet))
    assert prediction.calibration["source"] == "data sheet"
    assert prediction.calibration["measured"] is False
    assert prediction.intervals == {}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(pp=2, ep=8), "16 ranks, cluster 'made-up' has 8"),
        (Layout(ep=3), "parallelism.ep = 3: Eq 8: ep must divide the experts; model.experts = 8"),
        (Layout(pp=5), "parallelism.pp = 5: .* pp \\* vpp = 5 stages, at most model.layers = 4"),
        (Layout(micro_batch=5), "micro_batch \\* data-parallel ranks must divide the global batch; .*=35"),
        (Layout(schedule="zb"), "schedule = 'zb': must be 1f1b, gpipe, .* to train.*parallelism.schedule=1f1b"),
        (Layout(tp=2), "tp = 2: must be 1 to train.*parallelism.tp=1"),
        (
            Layout(pp=4, vpp=2, schedule="zbv"),
            "parallelism.pp = 4: .* pp \\* vpp = 8 stages, at most model.layers = 4",
        ),
        (
            Layout(pp=2, vpp=2, schedule="dualpipev", micro_batch=16),
            "dualpipev needs at least 2 pp = 4 micro-batches a step, micro_batches=2",
        ),
        (
            Layout(pp=2, schedule="zb_h1", recompute="full"),
            "recompute = 'full': schedule zb_h1 splits the backward, .*parallelism.recompute=selective",
        ),
    ],
)
def test_a_layout_without_such_a_step_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ResourceModelError, match=message):
        run(layout=layout)


def test_a_cluster_without_links_trains_on_one_rank_only() -> None:
    alone = cluster(calibration(*(name for name in UNITS if "/" in name)))
    assert run(given_cluster=alone, layout=Layout(micro_batch=2)).step_time_s > 0
    with pytest.raises(ResourceModelError, match="p2p"):
        run(given_cluster=alone)


def test_rows_travel_beside_shared_experts_for_as_long_as_these_take() -> None:
    model = replace(TINY, shared_experts=1, shared_expert_ffn=TINY.expert_ffn)
    alone = replace(LAYOUT, overlap_shared=False)
    slow, fast = (cluster(slower(calibration(), "all_to_all/node/2", factor)) for factor in (1e3, 1e-3))
    shared_s = run(model, slow, alone).terms["expert_s"] - run(TINY, slow, alone).terms["expert_s"]
    without, overlapped = run(model, slow, alone).terms, run(model, slow).terms
    assert without["dispatch_s"] - overlapped["dispatch_s"] == pytest.approx(shared_s)
    differing = {term for term in without if without[term] != pytest.approx(overlapped[term])}
    assert differing <= {"dispatch_s"} | WAITS
    hidden_s = run(model, fast, alone).terms["dispatch_s"] - run(model, fast).terms["dispatch_s"]
    assert 0 < hidden_s < 0.1 * shared_s
    same = replace(slow, devices_share_cores=True, cores=2.0)
    assert run(model, same).terms == run(model, same, alone).terms
