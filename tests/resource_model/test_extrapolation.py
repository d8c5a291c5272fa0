"""Predictions beyond what was measured: wider the farther, said so, and unchanged at the measured size."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.communication import EXTRAPOLATION, all_to_all, arrival_skew, overhead, p2p
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.step import step_cost
from piper_hpc.resource_model.extrapolation import growth, notes
from piper_hpc.resource_model.topology import Group
from piper_hpc.spec import EXECUTIONS, ClusterSpec, Layout, Link, MeasuredAllToAll, Prediction, Workload
from tests.planner import machines
from tests.resource_model.clusters import TINY, calibration, cluster

WORKLOAD = Workload(32, 128)
LAYOUTS = [
    Layout(pp=2, ep=4, micro_batch=2),
    Layout(pp=2, ep=2, dp=2, micro_batch=2),
    Layout(ep=8, micro_batch=2, all_to_all="halo"),
    Layout(pp=2, ep=2, dp=2, micro_batch=2, zero=1),
]


def measured_on(nodes: int | None, used_on: int = 4) -> ClusterSpec:
    given = calibration()
    size = {} if nodes is None else {"size": f"{nodes} nodes x 2 ranks"}
    return cluster(replace(given, provenance=size), nodes=used_on)


def numbers(found: Prediction) -> dict[str, object]:
    return {
        key: value for key, value in found.document().items() if key not in ("notes", "calibration")
    } | {"extrapolated": found.calibration["extrapolated"], "rests_on": found.calibration["rests_on"]}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("nodes", [4, 16])
def test_nothing_changes_on_as_many_nodes_or_fewer(layout: Layout, nodes: int) -> None:
    """To the last bit, whether or not the calibration says on how many nodes it was measured."""
    plain, known = (predict(TINY, measured_on(on), layout, WORKLOAD) for on in (None, nodes))
    assert numbers(known) == numbers(plain)
    said = [note for note in known.notes if note not in plain.notes]
    assert said == ([] if nodes == 4 else ["calibration: measured on 16 nodes, used on 4"])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_interval_is_wider_the_fewer_nodes_were_measured_and_what_stays_inside_is_not(layout: Layout) -> None:
    steps = [predict(TINY, measured_on(nodes), layout, WORKLOAD) for nodes in (4, 3, 2, 1)]
    for near, far in pairwise(steps):
        # A larger group than any waits longer for its latest rank: by more than was predicted without that.
        assert far.step_time_s >= near.step_time_s
        assert far.intervals["step_time_s"][1] / far.step_time_s > near.intervals["step_time_s"][1] / near.step_time_s
        for term in ("attention_s", "expert_s", "optimizer_s"):
            assert far.terms[term] == near.terms[term] and far.intervals[term] == near.intervals[term]
    assert EXTRAPOLATION in steps[-1].calibration["rests_on"]["grad_reduce_s"]
    (note,) = (note for note in steps[-1].notes if note.startswith("calibration:"))
    assert "measured on 1 node, used on 4" in note and "by a factor of 1.41" in note


@given(st.floats(1.0, 1e4), st.floats(1.0, 1e4))
def test_the_rule_is_monotone_and_doublings_multiply(one: float, other: float) -> None:
    assert growth(1.0) == growth(0.5) == 1.0
    assert (growth(one) <= growth(other)) == (one <= other) or math.isclose(one, other)
    assert growth(one * other) == pytest.approx(growth(one) * growth(other))


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 16, 64]), st.floats(1e3, 1e8))
def test_a_message_between_nodes_keeps_its_seconds_and_widens(nodes: int, on: int, message: float) -> None:
    exact, other = Curves(measured_on(nodes, nodes), 4), Curves(measured_on(on, nodes), 4)
    for tier in ("node", "rack", "system"):
        near, far = p2p(exact, tier, message), p2p(other, tier, message)
        beyond = 1.0 if tier == "node" else max(1.0, nodes / on)
        assert far.seconds == near.seconds
        assert far.half_widths.get(EXTRAPOLATION, 0.0) == pytest.approx((growth(beyond) - 1) * near.seconds)
        assert (far.half_widths == near.half_widths) == (beyond == 1)
        assert overhead(other, tier, message).half_widths == overhead(exact, tier, message).half_widths


def test_a_larger_group_than_any_is_scaled_and_as_uncertain_as_it_is_large() -> None:
    """On more nodes; a group of a measured size is less sure there too, by the nodes."""
    here, beyond = Curves(measured_on(8, 8), 4), Curves(measured_on(4, 8), 4)
    four, sixteen = Group((0, 1, 0, 2, 0)), Group((0, 1, 0, 14, 0))
    for group, factor in ((four, growth(2)), (sixteen, growth(4))):
        exact, far = (all_to_all(curves, group, 8e6) for curves in (here, beyond))
        assert far.seconds == exact.seconds
        assert far.half_widths[EXTRAPOLATION] == pytest.approx(exact.seconds * (factor - 1))
    assert "all_to_all/rack/16: not measured; all_to_all/rack/4 stands in" in " ".join(beyond.notes)
    inside = Group((0, 1, 0, 0, 0))
    assert all_to_all(beyond, inside, 8e6) == all_to_all(here, inside, 8e6)


def test_the_latest_of_more_ranks_is_later() -> None:
    here, beyond = Curves(measured_on(8, 8), 4), Curves(measured_on(4, 8), 4)
    sixteen, compute = Group((0, 1, 0, 14, 0)), Cost(1e-3, {"gemm": 1e-4})
    exact, far = (arrival_skew(curves, sixteen, compute) for curves in (here, beyond))
    assert far.seconds == pytest.approx(exact.seconds * math.sqrt(math.log(16) / math.log(4)))
    assert far.half_widths[EXTRAPOLATION] == pytest.approx(far.seconds * (growth(4) - 1))
    assert "skew/rack/4 stands in, times 1.41" in " ".join(beyond.notes)
    four = Group((0, 1, 0, 2, 0))
    assert arrival_skew(beyond, four, compute) == arrival_skew(here, four, compute)


def test_measured_algorithms_are_less_sure_in_larger_groups() -> None:
    """The model that was fitted to them holds for any group; its spread grows beyond the largest that it saw."""
    rows = tuple(
        MeasuredAllToAll(
            algorithm=algorithm, seconds=1e-4 * ranks + size / rate, spread=0.1, ranks=ranks, nodes=ranks // 2, racks=1,
            logical_bytes=size, row_bytes=512.0, top_k=2, experts=8, imbalance=1.0,
        )
        for algorithm, rate in (("flat", 1e9), ("halo", 2e9))
        for ranks in (2, 4)
        for size in (1e4, 1e5, 1e6, 1e7, 1e8)
    )  # fmt: skip
    layout = Layout(ep=8, micro_batch=2, all_to_all="halo")

    def spread(nodes: int) -> float:
        where = measured_on(nodes)
        given = replace(where, calibration=replace(where.calibration, exchanges=rows))
        ((_, exchange),) = step_cost(TINY, given, layout, WORKLOAD).all_to_alls
        return exchange.combine.forward.half_widths["dispatch_combine"] / exchange.combine.forward.seconds

    assert spread(4) == spread(8)
    assert spread(2) == spread(1) == pytest.approx((1 + spread(4)) * growth(2) - 1), "eight ranks, four were measured"


def test_the_analytical_engine_is_less_sure_of_measured_links_alone() -> None:
    where, layout, megatron = machines.cluster(), Layout(ep=16, dp=1, micro_batch=1), EXECUTIONS["megatron"]
    device = where.accelerator
    assert device is not None
    efficiency = replace(
        device.efficiency,
        measured=("link.node", "link.system"),
        spread=device.efficiency.spread | {"link.node": 0.1, "link.system": 0.1},
    )

    def step(nodes: int | None, measured: bool = True) -> Prediction:
        size = {} if nodes is None else {"size": f"{nodes} nodes x 8 ranks"}
        given = replace(
            where,
            links={"node": Link(1e-6, 1e11), "system": Link(1e-5, 1e10)},
            calibration=replace(calibration(), provenance=size),
            accelerator=replace(device, efficiency=efficiency if measured else replace(efficiency, measured=())),
        )
        return predict(machines.MOE, given, layout, machines.WORKLOAD, megatron)

    plain, exact, half, one = step(None), step(where.nodes), step(where.nodes // 2), step(1)
    assert exact.intervals == plain.intervals and exact.notes == plain.notes
    assert exact.terms == half.terms == one.terms
    assert exact.intervals["dispatch_s"][1] < half.intervals["dispatch_s"][1] < one.intervals["dispatch_s"][1]
    assert exact.intervals["attention_s"] == one.intervals["attention_s"]
    assert step(1, measured=False).intervals == exact.intervals, "a data sheet's links are as sure at any size"
    assert any(note.startswith("calibration: measured on 1 node, used on") for note in one.notes)


def test_a_data_sheet_was_measured_on_no_nodes() -> None:
    sheet = replace(calibration(), source="data sheet", provenance={"size": "8 nodes x 2 ranks"})
    assert sheet.nodes is None and list(notes(cluster(sheet, nodes=64))) == []
