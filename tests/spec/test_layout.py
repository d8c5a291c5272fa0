"""Layouts and the one map from ranks to places."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.spec import Layout, RankMap


@st.composite
def rank_maps(draw: st.DrawFn) -> RankMap:
    layout = Layout(pp=draw(st.integers(1, 5)), ep=draw(st.integers(1, 5)), dp=draw(st.integers(1, 4)))
    ranks_per_node = draw(st.integers(1, 6))
    nodes = -(-layout.ranks // ranks_per_node)
    per_rack = draw(st.integers(1, 3))
    return RankMap.block(layout, ranks_per_node, [node // per_rack for node in range(nodes)])


@given(rank_maps())
def test_coordinates_and_ranks_are_a_bijection(ranks: RankMap) -> None:
    layout = ranks.layout
    coordinates = {(place.pipeline_rank, place.replica, place.shard) for place in ranks.places}
    assert coordinates == {
        (stage, replica, shard)
        for stage in range(layout.pp)
        for replica in range(layout.dp)
        for shard in range(layout.ep)
    }
    for place in ranks.places:
        assert ranks.ranks_where(pipeline_rank=place.pipeline_rank, replica=place.replica, shard=place.shard) == [
            place.rank
        ]


@given(rank_maps())
def test_groups_of_a_kind_divide_all_ranks(ranks: RankMap) -> None:
    layout = ranks.layout
    sizes = {
        ranks.expert_group: layout.ep,
        ranks.replica_group: layout.dp,
        ranks.stage_group: layout.dense_dp,
        ranks.pipeline_group: layout.pp,
    }
    for group_of, size in sizes.items():
        groups = {tuple(group_of(rank)) for rank in range(layout.ranks)}
        assert Counter(rank for group in groups for rank in group) == Counter(range(layout.ranks))
        assert all(len(group) == size for group in groups)
        assert all(rank in group_of(rank) for rank in range(layout.ranks))


@given(rank_maps(), st.data())
def test_a_link_is_the_same_from_both_ends(ranks: RankMap, data: st.DataObject) -> None:
    a, b = (data.draw(st.integers(0, ranks.layout.ranks - 1)) for _ in range(2))
    assert ranks.tier(a, b) == ranks.tier(b, a)
    assert (ranks.tier(a, b) == "self") == (a == b)


@given(st.integers(1, 8), st.integers(0, 20))
def test_stages_divide_the_layers_in_order_and_evenly(pp: int, more: int) -> None:
    stages = Layout(pp=pp).layers_by_stage(pp + more)
    assert [layer for stage in stages for layer in stage] == list(range(pp + more))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1
    assert len(stages[0]) == max(map(len, stages))


def test_micro_batches_of_a_step() -> None:
    layout = Layout(pp=2, ep=2, dp=2, micro_batch=2)
    assert layout.ranks == 8
    assert layout.dense_dp == 4
    assert layout.micro_batches(32) == 4
    assert layout.name() == "pp2-ep2-dp2-mb2-1f1b"


@pytest.mark.parametrize(
    ("schedule", "vpp", "held"),
    [("1f1b", 1, [(0,), (1,)]), ("interleaved", 3, [(0, 2, 4), (1, 3, 5)]), ("zbv", 2, [(0, 3), (1, 2)])],
)
def test_a_rank_holds_the_stages_of_its_chunks(schedule, vpp, held):
    layout = Layout(pp=2, vpp=vpp, ep=2, schedule=schedule)
    places = RankMap.block(layout, 4, (0,)).places
    assert [place.stages for place in places] == [held[place.pipeline_rank] for place in places]
    assert sorted(stage for place in places[::2] for stage in place.stages) == list(range(layout.stages))
    assert [list(layers) for layers in layout.layers_by_stage(layout.stages)] == [[n] for n in range(layout.stages)]
