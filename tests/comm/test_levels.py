"""Hops on any machine: every row finds its way, groups agree, and even machines have the rails of Algorithm 1."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.comm.levels import Chains, Places
from piper_hpc.spec import ALGORITHMS

RACKS = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3)
"""Ranks of each node of each rack."""


def machine(racks: list[list[int]]) -> Places:
    """Places of ranks that fill the nodes in order."""
    nodes = [ranks for rack in racks for ranks in rack]
    node_of_rank = tuple(node for node, ranks in enumerate(nodes) for _ in range(ranks))
    rack_of_rank = tuple(index for index, rack in enumerate(racks) for ranks in rack for _ in range(ranks))
    return Places(node_of_rank, rack_of_rank)


@settings(max_examples=60, deadline=None)
@given(racks=RACKS, algorithm=st.sampled_from(ALGORITHMS), order=st.randoms(use_true_random=False))
def test_rows_find_their_way_on_any_machine(racks: list[list[int]], algorithm: str, order: object) -> None:
    """Also where ranks do not fill nodes in order."""
    places = machine(racks)
    shuffled = list(range(places.ranks))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    places = Places(*(tuple(each[rank] for rank in shuffled) for each in (places.node_of_rank, places.rack_of_rank)))
    chains = Chains(algorithm, places)
    every = [chains.chain(rank) for rank in range(places.ranks)]
    for source in range(places.ranks):
        for target in range(places.ranks):
            at = source
            for level in range(chains.depth):
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
    chain = Chains("halo", machine([[4, 4], [4, 4]])).chain(6)
    between, inside = chain.hops
    assert between.group == (2, 6, 10, 14) and inside.group == chain.own == (4, 5, 6, 7)
    assert between.peer_of_target == tuple(rank // 4 for rank in range(16))
    assert chain.sources[1] == (2, 6, 10, 14)


def test_third_level_joins_racks_before_nodes() -> None:
    chain = Chains("halo3", machine([[2, 2], [2, 2]])).chain(1)
    assert [(hop.phase, hop.group) for hop in chain.hops] == [
        ("between racks", (1, 5)), ("between nodes", (1, 3)), ("inside nodes", (0, 1)),
    ]  # fmt: skip


def test_uneven_nodes_share_the_rails_of_the_smallest() -> None:
    chains = Chains("halo", machine([[4, 2]]))
    assert chains.groups(0) == [(0, 2, 4), (1, 3, 5)]
    assert chains.chain(3).hops[0].peer_of_target == (1, 1, 1, 1, 2, 2), "place 3 sends to place 1 of the other node"


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
    assert Chains(algorithm, machine(racks)).depth == depth


def test_unknown_algorithm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"all_to_all=ring: must be one of flat, halo.*for example flat"):
        Chains("ring", machine([[2, 2]]))
