"""The buffers that a dispatcher of several levels keeps: counted by hand, and as its ranks really keep them."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch

from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.pool import pool_bytes
from piper_hpc.spec import ALGORITHMS, AllToAllCell, ExpertPlacement, Layout, Workload
from tests.comm.lockstep import Switchboard, dispatcher
from tests.comm.test_hierarchy import machine
from tests.resource_model.clusters import TINY, cluster

TOKENS, HIDDEN, TOP_K, SLOTS = 512, 4, 3, 4
PLACES = machine([[2, 2], [2, 2]])
CELL = AllToAllCell(
    ranks=8,
    nodes=4,
    racks=2,
    logical_bytes=TOKENS * TOP_K * HIDDEN * 4.0,
    row_bytes=HIDDEN * 4.0,
    top_k=TOP_K,
    experts=8 * SLOTS,
)


def kept_bytes(algorithm: str) -> float:
    """Mean over ranks of what the pools hold after a forward and a backward of uniformly drawn experts."""
    board, hierarchy = Switchboard(PLACES.ranks), Hierarchy(algorithm, PLACES)
    placement = ExpertPlacement.linear(CELL.experts, PLACES.ranks)

    def run(rank: int) -> int:
        generator = torch.Generator().manual_seed(rank)
        mine = dispatcher(board, algorithm, PLACES, rank, hierarchy)
        ids = torch.stack([torch.randperm(CELL.experts, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        tokens = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, generator=generator, requires_grad=True)
        begun, handle = mine.dispatch(tokens, ids, weights, placement)
        rows = handle.rows(begun)
        mine.combine(rows * 2, handle).sum().backward()
        kept = mine._transport._buffers._kept.values()
        return sum(each.numel() * each.element_size() for each in kept)

    return fmean(board.run(run))


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "flat"])
def test_it_is_what_the_ranks_keep(algorithm: str) -> None:
    assert pool_bytes(CELL, algorithm) == pytest.approx(kept_bytes(algorithm), rel=0.1)


def test_by_hand() -> None:
    """Of 4 nodes 3 / 4 of the rows are relayed: received, packed, brought back and unpacked, beside rows in and out."""
    assert pool_bytes(CELL, "flat") == 0
    assert pool_bytes(CELL, "halo") == CELL.logical_bytes * (1 + 1 + 4 * 3 / 4)
    assert pool_bytes(CELL, "halo3") == CELL.logical_bytes * (1 + 1 + 8 * 3 / 4)


def test_a_prediction_counts_them() -> None:
    """Two expert groups of four ranks on two nodes: half of the rows are relayed."""
    flat, halo = (
        predict(TINY, cluster(), Layout(ep=4, dp=2, all_to_all=name), Workload(8, 128)) for name in ("flat", "halo")
    )
    rows_bytes = 128 * TINY.top_k * TINY.hidden * 4
    assert flat.memory["exchange"] == [0]
    assert halo.memory["exchange"] == [4 * rows_bytes]
    assert halo.peak_memory_bytes[0] - flat.peak_memory_bytes[0] == 4 * rows_bytes
