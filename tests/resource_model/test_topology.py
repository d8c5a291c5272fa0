"""Groups by arithmetic: equal to counting ranks one by one where domains nest, never better than it elsewhere."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.eager.groups import Group, layout_groups
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.topology import axis_groups, boundary_tier, group, tier_links, topology_of
from piper_hpc.spec import Layout, Link, Topology
from tests.resource_model.clusters import cluster

FRONTIER = Topology(node=8, pair=2, switch=32)
NVL72 = Topology(node=72)

powers = st.integers(0, 5).map(lambda power: 2**power)


def counted(topology: Topology, members: list[int]) -> list[list[int]]:
    """Members in the pair, node, switch and rack of each member, itself included, by counting."""
    return [[sum(a // size == b // size for b in members) for size in topology.sizes] for a in members]


def tiling(size: int, stride: int, count: int) -> list[list[int]]:
    """The first `count` blocks of groups of `size` ranks, `stride` apart, that tile the ranks in order."""
    span = size * stride
    return [
        [block * span + inner + member * stride for member in range(size)]
        for block in range(count)
        for inner in range(stride)
    ]


@st.composite
def topologies(draw: st.DrawFn, factor: st.SearchStrategy[int]) -> Topology:
    pair = draw(st.sampled_from([None, draw(factor)]))
    node = (pair or 1) * draw(factor)
    switch = draw(st.sampled_from([None, node * draw(factor)]))
    return Topology(node, pair, switch, draw(st.sampled_from([None, (switch or node) * draw(factor)])))


@given(topologies(powers), powers, powers)
def test_powers_of_two_are_exact_for_every_member(topology: Topology, size: int, stride: int) -> None:
    found = group(topology, size, stride)
    assert found.size == size
    for members in tiling(size, stride, 4):
        for inside in counted(topology, members):
            assert inside == [found.within(tier) for tier in range(4)]


@given(topologies(st.integers(1, 4)), st.integers(1, 9), st.integers(1, 6))
def test_other_sizes_give_the_fewest_that_any_member_sees(topology: Topology, size: int, stride: int) -> None:
    found = group(topology, size, stride)
    period = np.lcm(size * stride, topology.sizes[-1]) // (size * stride)
    seen = [inside for members in tiling(size, stride, int(period)) for inside in counted(topology, members)]
    assert [found.within(tier) for tier in range(4)] == [min(column) for column in zip(*seen, strict=True)]
    assert found.size == size


@given(topologies(st.integers(1, 4)), st.integers(1, 12), st.integers(1, 5))
def test_boundaries_cross_what_their_farthest_partners_cross(topology: Topology, stage_ranks: int, pp: int) -> None:
    def tier(a: int, b: int) -> int:
        return sum(a // size != b // size for size in topology.sizes)

    for stage in range(pp - 1):
        senders = range(stage * stage_ranks, (stage + 1) * stage_ranks)
        assert boundary_tier(topology, stage_ranks, stage) == max(tier(a, a + stage_ranks) for a in senders)


def test_a_grid_of_layouts_equals_its_layouts_one_by_one() -> None:
    ep, dp = np.array([1, 2, 4, 8, 16, 64]), np.array([[1], [2], [8], [24]])
    for placement in ("linear", "strided"):
        grid = axis_groups(Layout(pp=4, ep=ep, dp=dp, etp=2, tp=2, placement=placement), FRONTIER)  # type: ignore[arg-type]
        for row in range(len(dp)):
            for column in range(len(ep)):
                one = Layout(pp=4, ep=int(ep[column]), dp=int(dp[row, 0]), etp=2, tp=2, placement=placement)
                for field in fields(grid):
                    expected = getattr(axis_groups(one, FRONTIER), field.name).peers
                    found = [np.broadcast_to(n, (4, 6))[row, column] for n in getattr(grid, field.name).peers]
                    assert tuple(found) == expected, (field.name, one)


def test_arithmetic_and_enumeration_agree_where_both_can() -> None:
    plain = cluster(nodes=8, ranks_per_node=4)
    told = replace(plain, topology=topology_of(plain))
    assert told.topology == Topology(node=4, rack=16)
    for layout in (Layout(pp=2, ep=8, dp=2), Layout(pp=1, ep=4, dp=8), Layout(pp=4, ep=2, dp=4), Layout(ep=32)):
        assert layout_groups(layout, told) == layout_groups(layout, plain)


def test_a_node_may_span_hosts() -> None:
    assert group(NVL72, 72).peers == (0, 71, 0, 0, 0)
    assert group(NVL72, 64).peers[1] == 7  # some group of 64 stands astride two racks, 8 of it on one side
    assert group(NVL72, 8).peers == (0, 7, 0, 0, 0)
    assert NVL72.tiers == ("node", "system")


def test_frontier_tiers() -> None:
    assert FRONTIER.tiers == ("pair", "node", "switch", "system")
    assert group(FRONTIER, 64).peers == (1, 6, 24, 0, 32)
    assert group(FRONTIER, 8, 8).peers == (0, 0, 3, 0, 4)
    assert group(FRONTIER, 1).tier == "node"
    assert group(FRONTIER, 2).tier == "pair"


def test_strided_placement_puts_one_expert_shard_on_each_node() -> None:
    layout = Layout(ep=4, dp=8)
    linear, strided = axis_groups(layout, FRONTIER), axis_groups(replace(layout, placement="strided"), FRONTIER)
    assert linear.experts.peers == (1, 2, 0, 0, 0)
    assert strided.experts.peers == (0, 0, 3, 0, 0)
    assert strided.replicas.peers == (1, 6, 0, 0, 0)
    assert strided.experts.size * strided.replicas.size == strided.stage.size
    # Too few replicas to fill a node: there is no such placement, and the linear one is what is left.
    few = Layout(ep=4, dp=2)
    assert axis_groups(replace(few, placement="strided"), FRONTIER) == axis_groups(few, FRONTIER)


@given(powers, powers, powers)
def test_placement_moves_peers_but_keeps_their_number(ep: int, dp: int, etp: int) -> None:
    layout = Layout(ep=ep, dp=dp, etp=etp)
    linear, strided = axis_groups(layout, FRONTIER), axis_groups(replace(layout, placement="strided"), FRONTIER)
    for field in fields(linear):
        assert getattr(linear, field.name).size == getattr(strided, field.name).size
        assert min(getattr(strided, field.name).peers) >= 0
    assert strided.experts.peers[-1] >= linear.experts.peers[-1]


def test_unknown_placements_and_links_are_refused() -> None:
    with pytest.raises(ResourceModelError, match="placement=snake: must be linear, pack or strided"):
        axis_groups(Layout(placement="snake"), FRONTIER)
    with pytest.raises(ResourceModelError, match="no link is known"):
        tier_links({}, name="nowhere")
    with pytest.raises(ResourceModelError, match="link 'rail': must be one of pair, node"):
        tier_links({"rail": Link(1e-6, 1e9)})
    with pytest.raises(ValueError, match="multiple of the next nearer"):
        Topology(node=8, switch=20)
    with pytest.raises(ValueError, match="bytes_per_s must be above 0"):
        Link(1e-6, 0.0)


def test_a_missing_tier_takes_the_next_wider_link_and_says_so() -> None:
    near, far = Link(1e-6, 1e11), Link(1e-5, 1e10)
    links = tier_links({"node": near, "system": far}, tiers=FRONTIER.tiers)
    assert links.links == (near, near, far, far, far)
    assert links.notes == (
        "link pair: not known; node stands in",
        "link switch: not known; system stands in",
    )
    assert links.latency_s[np.array([0, 4])].tolist() == [1e-6, 1e-5]
    assert 1 / links.s_per_byte[4] == pytest.approx(1e10)


def test_racks_of_unequal_sizes_have_no_topology() -> None:
    assert topology_of(cluster()) == Topology(node=2, rack=4)
    with pytest.raises(ResourceModelError, match=r"racks=\[0, 0, 1, 0\] are not blocks"):
        topology_of(replace(cluster(), rack_of_node=(0, 0, 1, 0)))


def test_a_group_of_one_has_no_peers() -> None:
    assert group(FRONTIER, 1) == Group()
