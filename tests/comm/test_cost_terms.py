"""The cost terms are what dispatchers do: bytes by link, and collectives."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.comm.volume import volume
from piper_hpc.resource_model.eager.all_to_all import cost_terms
from piper_hpc.spec import ALGORITHMS, ALL_TO_ALLS_PER_STEP, AllToAllCell, ExpertPlacement
from tests.comm.lockstep import Switchboard, dispatcher
from tests.comm.test_hierarchy import machine

TOP_K, HIDDEN, CHUNKS = 2, 3, 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("racks", [[[2, 2]], [[2, 2], [2, 2]], [[1, 1], [1, 1]]], ids=["2x2", "2x2x2", "2x2x1"])
def test_bytes_and_calls_are_those_of_a_real_exchange(algorithm: str, racks: list[list[int]]) -> None:
    """All sets of two experts once each, on every rank: uniform routing without chance."""
    places = machine(racks)
    experts, ranks = 2 * places.ranks, places.ranks
    ids = torch.tensor(list(combinations(range(experts), TOP_K)))
    board, hierarchy = Switchboard(ranks), Hierarchy(algorithm, places)
    placement = ExpertPlacement.linear(experts, ranks)

    def dispatch(rank: int) -> list[tuple[float, float]]:
        mine = dispatcher(board, algorithm, places, rank, hierarchy, chunks=CHUNKS)
        tokens, weights = torch.ones(len(ids), HIDDEN), torch.full(ids.shape, 0.5)
        begun, handle = mine.dispatch(tokens, ids, weights, placement)
        rows = handle.rows(begun)
        mine.combine(rows, handle)
        sent = volume(mine.sent(handle.plan), places, rank, row_bytes=4 * HIDDEN, weight_bytes=4)
        return [(each.payload_bytes, each.metadata_bytes) for each in sent.values()]

    sent = np.mean([np.sum(tiers, axis=-1) for tiers in board.run(dispatch)], axis=0)
    nodes, several = sum(map(len, racks)), len(racks)
    cell = AllToAllCell(ranks, nodes, several, len(ids) * TOP_K * 4.0 * HIDDEN, 4.0 * HIDDEN, TOP_K, experts)
    terms = cost_terms(algorithm, cell, CHUNKS)
    node, rack, system = terms.hops.sum(axis=0)
    if algorithm != "flat_dedup":  # whose index inside a node counts, and whose rows there are shared
        assert node + terms.local_bytes == pytest.approx(sent[0])
    assert rack == pytest.approx(sent[1] + sent[2]), "everything that leaves a node, wherever it goes"
    assert system == pytest.approx(sent[2])
    # A group of one makes no call of torch.distributed: the channel in memory counts it all the same.
    alone = {
        phase
        for level in range(hierarchy.depth)
        for phase in [hierarchy.phase(level)]
        if len(hierarchy.groups(level)[0]) == 1
    }
    calls = [sum(phase not in alone for phase, _ in each) for each in board.calls]
    assert set(calls) == {int(terms.collectives)}
    assert ALL_TO_ALLS_PER_STEP == 4, "dispatch and combine above, and the backward of both"
