"""The buffers that a dispatcher of several levels keeps: counted by hand, and as its ranks really keep them."""

from __future__ import annotations

from dataclasses import replace
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


def kept_bytes(algorithm: str, popularity: float = 1.0) -> tuple[list[int], float]:
    """What the pool of each rank holds after a forward and a backward of experts drawn at random, those of rank 0
    `popularity` times as often as others; and how many rows those get over the mean."""
    board, hierarchy = Switchboard(PLACES.ranks), Hierarchy(algorithm, PLACES)
    placement = ExpertPlacement.linear(CELL.experts, PLACES.ranks)
    shares, chosen = torch.ones(CELL.experts), [0] * PLACES.ranks
    shares[:SLOTS] = popularity

    def run(rank: int) -> int:
        generator = torch.Generator().manual_seed(rank)
        mine = dispatcher(board, algorithm, PLACES, rank, hierarchy)
        ids = torch.multinomial(shares.expand(TOKENS, -1), TOP_K, generator=generator)
        chosen[rank] = int((ids < SLOTS).sum())
        tokens = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, generator=generator, requires_grad=True)
        begun, handle = mine.dispatch(tokens, ids, weights, placement)
        rows = handle.rows(begun)
        mine.combine(rows * 2, handle).sum().backward()
        kept = mine._transport._buffers._kept.values()
        return sum(each.numel() * each.element_size() for each in kept)

    kept = board.run(run)
    return kept, sum(chosen) / (TOKENS * TOP_K)


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "flat"])
def test_it_is_what_the_ranks_keep(algorithm: str) -> None:
    kept, _ = kept_bytes(algorithm)
    assert pool_bytes(CELL, algorithm) == pytest.approx(fmean(kept), rel=0.1)


@pytest.mark.parametrize("popularity", [4.0, 16.0])
@pytest.mark.parametrize(("algorithm", "within"), [("halo", 0.02), ("halo_dedup", 0.02), ("flat_dedup", 0.02),
                                                   ("halo3", 0.06), ("halo3_dedup", 0.06)])  # fmt: skip
def test_the_busiest_rank_relays_what_its_node_is_sent(algorithm: str, within: float, popularity: float) -> None:
    (busiest, *others), load = kept_bytes(algorithm, popularity)
    assert load > 2.5 and busiest > max(others)
    assert pool_bytes(replace(CELL, imbalance=load), algorithm) == pytest.approx(busiest, rel=within)


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
