"""Counted bytes and messages of a plan, by level, equal the cost model's where its assumptions hold exactly."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from piper_hpc.comm.hierarchy import Hierarchy, Places
from piper_hpc.comm.volume import volume
from piper_hpc.resource_model.all_to_all import AllToAllRouting, all_to_all
from piper_hpc.resource_model.topology import Group, tier_links
from piper_hpc.spec import ALGORITHMS, LEVELS, TIERS, WEIGHT_BYTES, ExpertPlacement, Link
from tests.comm.lockstep import Switchboard, dispatcher
from tests.comm.test_hierarchy import machine

ROW_BYTES, TOP_K = 12, 2


def every_choice(experts: int) -> torch.Tensor:
    """All sets of TOP_K experts, once each: uniform routing without chance."""
    return torch.tensor(list(combinations(range(experts), TOP_K)))


def counted(algorithm: str, places: Places, experts: int) -> list[dict[str, tuple[int, int, int, int]]]:
    """By rank and tier: rows, payload bytes, metadata bytes and messages of a dispatch in one chunk."""
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)
    placement = ExpertPlacement.linear(experts, places.ranks)

    def rank_plan(rank: int) -> dict[str, tuple[int, int, int, int]]:
        mine = dispatcher(board, algorithm, places, rank, hierarchy, chunks=1)
        ids = every_choice(experts)
        begun, handle = mine.dispatch(torch.ones(len(ids), 3), ids, torch.ones(ids.shape), placement)
        handle.rows(begun)
        sent = volume(mine.sent(handle.plan), places, rank, row_bytes=ROW_BYTES, weight_bytes=WEIGHT_BYTES)
        return {
            tier: (each.rows, each.payload_bytes, each.metadata_bytes, each.messages) for tier, each in sent.items()
        }

    return board.run(rank_plan)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("racks", [[[4]], [[2, 2]], [[4, 4]], [[2, 2, 2, 2]], [[2, 2], [2, 2]], [[1, 1], [1, 1]]])
def test_counted_bytes_equal_the_cost_model(algorithm: str, racks: list[list[int]]) -> None:
    places = machine(racks)
    experts = 2 * places.ranks
    node, rack = racks[0][0], sum(racks[0])
    group = Group((0, node - 1, 0, rack - node, places.ranks - rack))
    predicted = all_to_all(
        algorithm, group, tier_links({"node": Link(0.0, 1.0)}, name="any"), TOP_K * len(every_choice(experts)),
        ROW_BYTES, AllToAllRouting(experts, TOP_K),
    )  # fmt: skip
    ranks = counted(algorithm, places, experts)
    for tier in LEVELS:
        at = TIERS.index(tier)
        rows, payload, metadata, messages = np.mean([each[tier] for each in ranks], axis=0)
        assert rows == pytest.approx(predicted.rows[at], rel=1e-12)
        assert payload == pytest.approx(predicted.payload_bytes[at], rel=1e-12)
        assert metadata == pytest.approx(predicted.metadata_bytes[at], rel=1e-12)
        # Rows of the own node are a message of their own beside those that came from other nodes.
        assert messages == pytest.approx(predicted.messages[at], rel=1e-12)


def test_deduplication_halves_what_two_choices_of_a_node_send() -> None:
    places = machine([[2, 2]])
    plain, dedup = (counted(algorithm, places, 8) for algorithm in ("halo", "halo_dedup"))
    # 28 pairs of 8 experts; 4 on the other node: 6 pairs wholly there, 16 with one there.
    assert [each["rack"][0] for each in plain] == [28] * 4
    assert [each["rack"][0] for each in dedup] == [22] * 4
