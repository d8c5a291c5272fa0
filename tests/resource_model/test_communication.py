"""Groups and the links they cross, and the seconds of what they exchange."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.eager.communication import (
    all_reduce,
    all_to_all,
    all_to_all_bytes,
    arrival_skew,
    message,
    overhead,
    p2p,
)
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves, seconds_at
from piper_hpc.resource_model.eager.groups import TIERS, Group, layout_groups
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import Calibration, ClusterSpec, Layout, RankMap, Tier
from tests.resource_model.clusters import TINY, UNITS, calibration, cluster, line

IN_NODE, ACROSS_NODES = Group((0, 1, 0, 0, 0)), Group((0, 1, 0, 2, 0))


def read(*without: str) -> Curves:
    return Curves(cluster(calibration(*without)), 4)


@st.composite
def placements(draw: st.DrawFn) -> tuple[Layout, ClusterSpec]:
    layout = Layout(pp=draw(st.integers(1, 4)), ep=draw(st.integers(1, 4)), dp=draw(st.integers(1, 3)))
    ranks_per_node = draw(st.integers(1, 5))
    nodes = -(-layout.ranks // ranks_per_node)
    per_rack = draw(st.integers(1, 3))
    racks = tuple(node // per_rack for node in range(nodes))
    return layout, ClusterSpec("drawn", nodes, ranks_per_node, racks, 2**30, calibration())


@given(placements())
def test_groups_cross_the_links_that_the_rank_map_says(placement: tuple[Layout, ClusterSpec]) -> None:
    layout, drawn = placement
    ranks = RankMap.block(layout, drawn.ranks_per_node, drawn.rack_of_node)
    groups = layout_groups(layout, drawn)

    def widest(pairs: list[tuple[int, int]]) -> str:
        tiers = [ranks.tier(a, b) for a, b in pairs if a != b]
        return max(tiers, key=TIERS.index, default=Tier.NODE.value)

    for stage, of_stage in enumerate(groups.stages):
        members = ranks.ranks_where(pipeline_rank=stage)
        assert of_stage.stage.size == len(members) == layout.ep * layout.dp
        assert of_stage.stage.tier == widest([(a, b) for a in members for b in members])
        assert of_stage.experts.size == layout.ep
        assert of_stage.experts.tier == widest([(a, b) for a in members for b in ranks.expert_group(a)])
        assert of_stage.replicas.size == layout.dp
        assert of_stage.replicas.tier == widest([(a, b) for a in members for b in ranks.replica_group(a)])
    for boundary, tier in enumerate(groups.boundaries):
        senders = ranks.ranks_where(pipeline_rank=boundary)
        assert tier == widest([(a, ranks.pipeline_group(a)[boundary + 1]) for a in senders])
    assert groups.world.size == layout.ranks


def test_an_expert_group_inside_a_node_stays_there() -> None:
    groups = layout_groups(Layout(pp=2, ep=2, dp=2), cluster())
    assert groups.stages[0].experts == Group((0, 1, 0, 0, 0))
    assert groups.stages[0].replicas == Group((0, 0, 0, 1, 0))
    assert groups.stages[0].stage == Group((0, 1, 0, 2, 0))
    assert groups.boundaries == ("system",)
    assert groups.world == Group((0, 1, 0, 2, 4))


def test_bytes_of_a_dispatch_are_every_routed_copy() -> None:
    assert all_to_all_bytes(tokens=512, model=TINY, bytes_per_value=4) == 512 * 2 * 128 * 4


def test_a_measured_group_is_read_from_its_own_curve() -> None:
    assert all_to_all(read(), IN_NODE, 1e6).curves == ["all_to_all/node/2"]
    assert all_reduce(read(), ACROSS_NODES, 1e6).curves == ["all_reduce/rack/4"]


def test_another_size_is_scaled_at_equal_bytes_per_pair() -> None:
    curves = read()
    eight = Group((0, 1, 0, 6, 0))
    cost = all_to_all(curves, eight, 8e6)
    assert cost.seconds == pytest.approx(seconds_at(line("all_to_all/rack/4"), 4e6) * 7 / 3)
    assert "all_to_all/rack/8: not measured; all_to_all/rack/4 stands in" in " ".join(curves.notes)


def test_without_a_collective_messages_to_every_peer_stand_in() -> None:
    curves = read("all_to_all/rack/4")
    cost = all_to_all(curves, ACROSS_NODES, 4e6)
    near, far = seconds_at(line("p2p/node"), 1e6), seconds_at(line("p2p/rack"), 1e6)
    assert cost.seconds == pytest.approx(near + 2 * far)
    assert cost.curves == ["p2p/node", "p2p/rack"]


def test_without_an_all_reduce_a_ring_stands_in() -> None:
    cost = all_reduce(read("all_reduce/rack/4"), ACROSS_NODES, 4e6)
    assert cost.seconds == pytest.approx(2 * 3 * seconds_at(line("p2p/rack"), 1e6))


def test_a_missing_tier_is_taken_from_the_next_wider_one() -> None:
    assert p2p(read("p2p/rack"), "rack", 1e6).curves == ["p2p/system"]
    assert p2p(read("p2p/system"), "system", 1e6).curves == ["p2p/rack"]


def test_a_group_of_one_exchanges_nothing() -> None:
    assert all_to_all(read(), Group(), 1e9).seconds == 0.0
    assert all_reduce(read(), Group(), 1e9).seconds == 0.0


def test_skew_grows_with_the_compute_before_a_meeting_and_is_as_uncertain() -> None:
    sure, unsure = Cost(1e-3, {"gemm": 0.0}), Cost(1e-3, {"gemm": 1e-3})
    waited = arrival_skew(read(), IN_NODE, sure)
    assert waited.seconds == pytest.approx(1e-5 + 1e-3 / 4)
    assert arrival_skew(read(), IN_NODE, sure * 10).seconds > waited.seconds
    assert waited.half_widths["gemm"] == 0.0
    assert arrival_skew(read(), IN_NODE, unsure).half_widths["gemm"] > 0.0
    assert arrival_skew(read(), Group(), sure) == Cost()


def test_rows_under_way_hide_how_late_other_ranks_are() -> None:
    compute = Cost(1e-3, {"gemm": 1e-3})
    whole = arrival_skew(read(), IN_NODE, compute)
    half = arrival_skew(read(), IN_NODE, compute, under_way_s=whole.seconds / 2)
    assert half.seconds == pytest.approx(whole.seconds / 2) and half.half_width == pytest.approx(whole.half_width / 2)
    assert arrival_skew(read(), IN_NODE, compute, under_way_s=2 * whole.seconds).seconds == 0.0
    assert arrival_skew(read(), Group(), compute, under_way_s=1.0) == Cost()


def test_skew_of_another_group_stands_in_and_is_said_to() -> None:
    curves, compute = read("skew/rack/4"), Cost(1e-3)
    assert arrival_skew(curves, ACROSS_NODES, compute).curves == ["skew/node/2"]
    assert "skew/rack/4: not measured; skew/node/2 stands in" in " ".join(curves.notes)


def test_skew_of_the_same_size_on_another_tier_goes_before_another_size() -> None:
    curves = read()
    assert arrival_skew(curves, Group((0, 0, 0, 3, 0)), Cost(1e-3)).curves == ["skew/rack/4"]
    assert arrival_skew(curves, Group((0, 0, 0, 1, 0)), Cost(1e-3)).curves == ["skew/node/2"]
    assert curves.notes == {}


def test_a_message_waits_for_what_its_sender_goes_on_with() -> None:
    curves, compute = read(), Cost(1e-3)
    alone = p2p(curves, "node", 1e5)
    assert message(curves, "node", 1e5, compute).seconds == pytest.approx(alone.seconds + 1e-5 + 1e-3 / 4)
    assert message(curves, "node", 1e5, Cost()).seconds == alone.seconds


def test_an_end_of_a_message_costs_what_was_measured_and_nothing_where_nothing_was() -> None:
    curves = read()
    assert overhead(curves, "node", 8e5).seconds == seconds_at(line("overhead/node"), 8e5)
    assert overhead(curves, "system", 8e5).curves == ["overhead/rack"]
    bare = read("overhead/node", "overhead/rack")
    assert overhead(bare, "node", 8e5) == Cost()
    assert "overhead: not measured; messages between stages are taken to cost no compute" in bare.notes


def test_no_link_at_all_is_refused_with_what_to_do() -> None:
    silent = Curves(cluster(calibration(*(name for name in UNITS if "/" in name))), 4)
    with pytest.raises(ResourceModelError, match=r"no p2p/node curve.*task=microbench cluster=made-up"):
        all_to_all(silent, IN_NODE, 1e6)


def test_nothing_measured_and_nothing_asked_is_no_error() -> None:
    bare = Curves(cluster(Calibration("data sheet", "", 1e12)), 4)
    assert all_to_all(bare, Group(), 1e6).seconds == 0.0
