"""Hops on any machine: every row finds its way, groups agree, and even machines have the rails of Algorithm 1."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.comm.hierarchy import Hierarchy, Places
from piper_hpc.spec import ALGORITHMS, Layout, RankMap

RACKS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3)
"""Ranks of each node of each rack."""


def machine(racks: list[list[int]]) -> Places:
    """Places of ranks that fill the nodes in order."""
    nodes = [ranks for rack in racks for ranks in rack]
    node_of_rank = tuple(node for node, ranks in enumerate(nodes) for _ in range(ranks))
    rack_of_rank = tuple(index for index, rack in enumerate(racks) for ranks in rack for _ in range(ranks))
    return Places(node_of_rank, rack_of_rank)


def with_cards(places: Places, cards: int, seed: int) -> Places:
    """The same ranks, each on some of `cards` network cards of its node; nobody knows which where there are none."""
    drawn = random.Random(seed)
    return replace(places, nic_of_rank=tuple(drawn.randrange(cards) for _ in range(places.ranks)) if cards else None)


@settings(max_examples=60, deadline=None)
@given(racks=RACKS, algorithm=st.sampled_from(list(ALGORITHMS)), cards=st.integers(0, 3), seed=st.integers(0, 10**6))
def test_rows_find_their_way_on_any_machine(racks: list[list[int]], algorithm: str, cards: int, seed: int) -> None:
    """Also where ranks do not fill nodes in order, and sit on network cards as they like."""
    places = machine(racks)
    shuffled = list(range(places.ranks))
    random.Random(seed).shuffle(shuffled)
    node_of_rank, rack_of_rank = (
        tuple(each[rank] for rank in shuffled) for each in (places.node_of_rank, places.rack_of_rank)
    )
    places = with_cards(Places(node_of_rank, rack_of_rank), cards, seed)
    hierarchy = Hierarchy(algorithm, places)
    every = [hierarchy.chain(rank) for rank in range(places.ranks)]
    for source in range(places.ranks):
        for target in range(places.ranks):
            at = source
            for level in range(hierarchy.depth):
                here = every[at]
                assert source in here.sources[level] and target in here.domains[level]
                hop = here.hops[level]
                at = hop.group[hop.peer_of_target[here.domains[level].index(target)]]
                assert every[at].hops[level].group == hop.group
            assert at == target
    for chain in every:
        assert sorted(chain.sources[-1]) == list(range(places.ranks)), "each source comes on one way"
        assert [sum(arriving) for arriving in chain.arriving] == [len(sources) for sources in chain.sources[1:]]


def test_even_machine_has_the_rails_of_algorithm_1() -> None:
    chain = Hierarchy("halo", machine([[4, 4], [4, 4]])).chain(6)
    between, inside = chain.hops
    assert between.group == (2, 6, 10, 14) and inside.group == chain.local == (4, 5, 6, 7)
    assert between.peer_of_target == tuple(rank // 4 for rank in range(16))
    assert chain.sources[1] == (2, 6, 10, 14)


@pytest.mark.parametrize("algorithm", ["halo", "halo3"])
def test_cards_in_the_order_of_ranks_change_nothing(algorithm: str) -> None:
    places = machine([[4, 4], [4, 4]])
    without, hierarchy = (Hierarchy(algorithm, replace(places, nic_of_rank=nic)) for nic in (None, (0, 0, 1, 1) * 4))
    assert all(hierarchy.chain(rank) == without.chain(rank) for rank in range(16))


def test_rails_join_equal_cards_whatever_the_place() -> None:
    """One node counts its cards from the other end."""
    places = Places((0, 0, 0, 0, 1, 1, 1, 1), (0,) * 8, (0, 0, 1, 1, 1, 1, 0, 0))
    hierarchy = Hierarchy("halo", places)
    assert hierarchy.groups(0) == [(0, 6), (1, 7), (2, 4), (3, 5)]
    assert Hierarchy("halo", replace(places, nic_of_rank=None)).groups(0) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert hierarchy.chain(0).hops[0].peer_of_target == (0, 0, 0, 0, 1, 1, 1, 1)


def test_group_that_begins_in_the_middle_of_a_node_joins_the_cards_that_both_have() -> None:
    """Nodes of 8 ranks with two a card: local ranks 4 to 7 of one, and all of the next; and none of its first 4."""
    rank_map = replace(RankMap.block(Layout(ep=4, dp=4), 8, (0, 0)), ranks_per_nic=2)
    hierarchy = Hierarchy("halo", Places.of(rank_map, tuple(range(4, 16))))
    # In the group ranks 0 to 3 are on cards 2, 2, 3, 3; ranks 4 to 11 on cards 0 to 3 of the other node.
    assert hierarchy.groups(0) == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    assert [hierarchy.chain(rank).hops[0].peer_of_target[4] for rank in range(4)] == [2, 2, 2, 2], "to ranks 8 to 11"
    # Without a card in common the rails still join all, in order.
    assert Hierarchy("halo", Places.of(rank_map, tuple(range(4, 12)))).groups(0) == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_third_level_joins_racks_before_nodes() -> None:
    chain = Hierarchy("halo3", machine([[2, 2], [2, 2]])).chain(1)
    assert [(hop.phase, hop.group) for hop in chain.hops] == [
        ("between racks", (1, 5)), ("between nodes", (1, 3)), ("inside nodes", (0, 1)),
    ]  # fmt: skip


def test_uneven_nodes_share_the_rails_of_the_smallest() -> None:
    hierarchy = Hierarchy("halo", machine([[4, 2]]))
    assert hierarchy.groups(0) == [(0, 2, 4), (1, 3, 5)]
    assert hierarchy.chain(3).hops[0].peer_of_target == (1, 1, 1, 1, 2, 2), "place 3 sends to place 1 of the other node"


@pytest.mark.parametrize(
    ("algorithm", "racks", "depth"),
    [
        ("halo", [[8]], 1),  # one node
        ("halo", [[1, 1]], 2),  # one rank a node: rows of several of its experts may still travel as one
        ("halo3", [[4, 4]], 2),  # one rack
        ("halo3", [[4], [4]], 2),  # racks of one node
        ("halo3_dedup", [[1, 1], [1, 1]], 3),
        ("flat", [[4, 4], [4, 4]], 1),
        ("flat_dedup", [[4, 4], [4, 4]], 2),
        ("flat_dedup", [[4]], 2),
        ("flat_dedup", [[1]], 1),
    ],
)
def test_levels_without_work_are_left_out(algorithm: str, racks: list[list[int]], depth: int) -> None:
    assert Hierarchy(algorithm, machine(racks)).depth == depth


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all_to_all=ring: must be one of flat, halo.*for example flat"):
        Hierarchy("ring", machine([[2, 2]]))
