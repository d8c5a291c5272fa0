"""Which ranks measure together: pure functions of the placement."""

from __future__ import annotations

from piper_hpc.microbench.groups import group_families, pairs, widest_tier
from piper_hpc.microbench.shapes import CPU, GPU
from piper_hpc.spec import Layout, RankMap

FOUR_NODES = RankMap.block(Layout(dp=8), ranks_per_node=2, rack_of_node=(0, 0, 1, 1))


def test_one_pair_for_each_tier_near_ones_first() -> None:
    assert pairs(FOUR_NODES) == {"node": (0, 1), "rack": (0, 2), "system": (0, 4)}
    assert list(pairs(FOUR_NODES)) == ["node", "rack", "system"]


def test_a_single_node_has_one_tier() -> None:
    ranks = RankMap.block(Layout(dp=4), ranks_per_node=4, rack_of_node=(0,))
    assert pairs(ranks) == {"node": (0, 1)}
    assert [(family.size, family.tier) for family in group_families(ranks)] == [(2, "node"), (4, "node")]


def test_families_cover_every_size_and_tier_and_are_disjoint() -> None:
    families = {(family.size, family.tier): family for family in group_families(FOUR_NODES)}
    assert list(families) == [
        (2, "node"),
        (2, "rack"),
        (2, "system"),
        (4, "rack"),
        (4, "system"),
        (8, "system"),
    ]
    assert families[2, "node"].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert families[2, "rack"].groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert families[4, "rack"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    for family in families.values():
        assert len(set(family.ranks)) == len(family.ranks) == 8
        assert all(widest_tier(FOUR_NODES, group) == family.tier for group in family.groups)


def test_a_world_that_is_no_power_of_two_uses_its_divisors() -> None:
    ranks = RankMap.block(Layout(dp=6), ranks_per_node=3, rack_of_node=(0, 0))
    assert [(family.size, family.tier) for family in group_families(ranks)] == [
        (2, "rack"),
        (3, "node"),
        (3, "rack"),
        (6, "rack"),
    ]


def test_grids_ascend_in_message_size() -> None:
    for grid in (CPU, GPU):
        for sizes in grid.messages.values():
            assert list(sizes) == sorted(set(sizes))
