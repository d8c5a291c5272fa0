"""Switches above nodes: read as Slurm prints them, found in timed messages, and nodes packed below them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.cluster.domains import (
    MIN_TIME_RATIO,
    expand_hostlist,
    narrowed_to_allocation,
    pack,
    paths_from_hostlists,
    paths_from_message_times,
    paths_from_scontrol,
)
from piper_hpc.runtime.pairs import rounds
from piper_hpc.spec import Topology

TREE = """\
SwitchName=rack1 Level=0 LinkSpeed=1 Nodes=n[1-2]
SwitchName=rack2 Level=0 LinkSpeed=1 Nodes=n[3-4]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=n[1-4] Switches=rack[1-2]
"""


@pytest.mark.parametrize(
    ("names", "nodes"),
    [
        ("n1", ["n1"]),
        ("n[1-3,7],login", ["n1", "n2", "n3", "n7", "login"]),
        ("frontier[00098-00101]", ["frontier00098", "frontier00099", "frontier00100", "frontier00101"]),
        ("r[1-2]n[08-09].site", ["r1n08.site", "r1n09.site", "r2n08.site", "r2n09.site"]),
        ("", []),
    ],
)
def test_host_lists_are_read_as_slurm_writes_them(names: str, nodes: list[str]) -> None:
    assert expand_hostlist(names) == nodes


def test_what_scontrol_prints_of_trees_and_blocks() -> None:
    assert paths_from_scontrol(TREE) == {
        "n1": ("spine", "rack1"), "n2": ("spine", "rack1"), "n3": ("spine", "rack2"), "n4": ("spine", "rack2"),
    }  # fmt: skip
    blocks = "BlockName=b1 BlockIndex=0 Nodes=n[1-2] BlockSize=2\nBlockName=b2 BlockIndex=1 Nodes=n[3-4] BlockSize=2\n"
    assert paths_from_scontrol(blocks)["n3"] == ("b2",)
    assert paths_from_scontrol("No topology information available\n") == {}
    assert paths_from_hostlists({"sw1": "n[1-2]"}) == {"n1": ("sw1",), "n2": ("sw1",)}


paths = st.lists(st.tuples(st.sampled_from("st"), st.sampled_from("abc")), min_size=1, max_size=16)


@given(paths, st.integers(1, 4))
def test_packing_keeps_every_node_and_as_many_groups_below_one_switch_as_can_be(
    given_paths: list[tuple[str, str]], size: int
) -> None:
    order = pack(given_paths, size)
    assert sorted(order) == list(range(len(given_paths)))
    groups = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    for level in (1, 2):
        inside = sum(len({given_paths[node][:level] for node in group}) == 1 for group in groups)
        domains = Counter(path[:level] for path in given_paths)
        assert inside == sum(count // size for count in domains.values())


def test_single_nodes_are_sorted_into_blocks_that_keep_their_order() -> None:
    assert pack([("spine", rack) for rack in ("r1", "r2", "r1", "r2")]) == [0, 2, 1, 3]
    assert pack([(), (), ()]) == [0, 1, 2]


@settings(deadline=None)  # the first call imports scipy
@given(
    st.lists(st.integers(0, 2), min_size=3, max_size=12),
    st.floats(1.6, 20.0),
    st.integers(0, 2**31),
)
def test_messages_between_nodes_show_their_racks(racks: list[int], slower: float, seed: int) -> None:
    """With 5 % of noise either way, a link that is 1.6 times slower tells; a rack of one node is a domain too."""
    noise = np.random.default_rng(seed).uniform(0.95, 1.05, (len(racks), len(racks)))
    seconds = np.array([[1.0 if a == b else slower for a in racks] for b in racks]) * np.maximum(noise, noise.T)
    found = paths_from_message_times(seconds)
    if len(set(racks)) == 1:
        assert len(set(found)) == 1
    elif max(Counter(racks).values()) > 1:
        assert all((found[a] == found[b]) == (racks[a] == racks[b]) for a in range(len(racks)) for b in range(a))


def test_racks_of_a_row_are_found_below_it() -> None:
    place = [(row, rack) for row in range(2) for rack in range(2) for _ in range(3)]
    far = [[1.0 if a == b else 2.0 if a[0] == b[0] else 6.0 for a in place] for b in place]
    found = paths_from_message_times(np.array(far))
    assert len(set(found)) == 4 and len({path[:1] for path in found}) == 2
    assert MIN_TIME_RATIO < 2.0


@given(st.integers(1, 17))
def test_every_pair_of_nodes_meets_once_and_no_node_is_in_two_pairs_of_a_round(nodes: int) -> None:
    played = rounds(nodes)
    pairs = [pair for group in played for pair in group]
    assert sorted(pairs) == [(a, b) for a in range(nodes) for b in range(a + 1, nodes)]
    assert all(max(Counter(node for pair in group for node in pair).values(), default=1) == 1 for group in played)


@pytest.mark.parametrize(
    ("leaves", "nodes_of_a_block"),
    [("aaaabbbbcc", 4), ("aabb", 2), ("aaabbbbc", 1), ("abab", 1), ("aaaa", 4), ("aaaaaaaabbbb", 4)],
)
def test_the_switch_of_a_job_is_what_was_granted_of_it(leaves: str, nodes_of_a_block: int) -> None:
    granted = narrowed_to_allocation(Topology(node=8, pair=2, switch=32), leaves, 8)
    assert granted.sizes == (2, 8, 8 * nodes_of_a_block, 8 * nodes_of_a_block)
