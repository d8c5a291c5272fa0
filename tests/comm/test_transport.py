"""How rows are sent: relay buffers that stay where they are, and one gather before each phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from piper_hpc.comm.channel import Channel, Work
from piper_hpc.comm.factory import builder
from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.comm.transport import BufferPool
from piper_hpc.spec import ALGORITHMS
from tests.comm.lockstep import MemoryChannel, Switchboard, dispatcher
from tests.comm.test_algorithms import problem
from tests.comm.test_hierarchy import machine

Memory = tuple[torch.Tensor, torch.Tensor]
"""What one exchange reads and writes."""


class KeepingChannel:
    """A channel that keeps what every exchange of rows reads and writes, so that none of it is ever freed: memory at
    the same address is the same memory."""

    def __init__(self, channel: Channel, kept: list[Memory]) -> None:
        self.channel, self.kept = channel, kept

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        if source.is_floating_point() and source.dim() == 2:
            self.kept.append((source, output))
        return self.channel.all_to_all(output, source, recv_rows, send_rows)


@pytest.mark.parametrize("algorithm", [name for name, algorithm in ALGORITHMS.items() if algorithm.domains])
def test_exchanges_of_equal_size_use_the_same_memory(algorithm: str) -> None:
    """Dispatch twice, and where rows are not added up on their way also combine and the backward of both."""
    places = machine([[2, 2], [2, 2]])
    given = problem(places, slots=1, top_k=3, load="even", dtype=torch.float32, seed=5)
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)
    dedup = ALGORITHMS[algorithm].dedup

    def twice(rank: int) -> list[list[tuple[int, int]]]:
        kept: list[Memory] = []
        hops = hierarchy.chain(rank).hops
        channels = [
            KeepingChannel(MemoryChannel(board, hierarchy.phase(level), hop.group, rank), kept)
            for level, hop in enumerate(hops)
        ]
        mine = builder(algorithm)(hierarchy, rank, channels, dedup=dedup, chunks=2)
        seen, outputs = [], []
        for _ in range(2):
            tokens, weights = given.tokens[rank].clone().requires_grad_(), given.weights[rank].clone().requires_grad_()
            before = len(kept)
            begun, handle = mine.dispatch(tokens, given.expert_ids[rank], weights, given.placement)
            rows = handle.rows(begun)
            if not dedup:
                mine.combine(rows, handle).sum().backward()
            outputs.append(rows)
            exchanges = [memory for memory in kept[before:] if all(len(each) for each in memory)]
            seen.append([(source.data_ptr(), output.data_ptr()) for source, output in exchanges])
        assert torch.equal(outputs[0], outputs[1])
        return seen

    for first, second in board.run(twice):
        assert first == second and first


def test_buffers_grow_and_never_shrink() -> None:
    buffers, row = BufferPool(), torch.zeros(0, 3)
    first = buffers.take("rows", 8, row)
    assert first.shape == (8, 3)
    assert buffers.take("rows", 5, row).data_ptr() == first.data_ptr(), "a smaller one fits in"
    larger = buffers.take("rows", 20, row)
    assert larger.shape == (20, 3) and larger.data_ptr() != first.data_ptr()
    assert buffers.take("rows", 8, row).data_ptr() == larger.data_ptr()
    assert buffers.take("others", 8, row).data_ptr() != larger.data_ptr()
    assert buffers.take("rows", 8, row.double()).dtype == torch.float64


class Gathers(TorchDispatchMode):
    """Notes in `events` every gather of rows that torch carries out on this thread."""

    def __init__(self, events: list[Any]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.index_select.default, torch.ops.aten.index_select.out) and args[0].dim() == 2:
            self.events.append(("gather", None))
        return function(*args, **(kwargs or {}))


DISPATCHED = {
    "halo": "gather, inside nodes, between nodes, gather, inside nodes, gather",
    "halo3": "gather, inside nodes, between racks, gather, between nodes, gather, inside nodes, gather",
}
COMBINED = {
    "halo": "gather, inside nodes, inside nodes, gather, between nodes, gather",
    "halo3": "gather, inside nodes, inside nodes, gather, between nodes, gather, between racks, gather",
}


@pytest.mark.parametrize("algorithm", ["halo", "halo3"])
def test_each_phase_has_one_gather(algorithm: str) -> None:
    """Phases in their order, by one gather before the first two, one before each further one, and one at the end."""
    places = machine([[2, 2], [2, 2]])
    given = problem(places, slots=1, top_k=3, load="even", dtype=torch.float32, seed=6)
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)

    def carried(rank: int) -> list[str]:
        mine = dispatcher(board, algorithm, places, rank, hierarchy, chunks=1, overlap="none")
        plan = mine.plan(given.expert_ids[rank], given.placement)
        tokens, weights = given.tokens[rank].clone().requires_grad_(), given.weights[rank].clone()
        events: list[Any] = board.calls[rank]
        seen = [len(events)]
        with Gathers(events):
            begun, handle = mine.dispatch(tokens, given.expert_ids[rank], weights, given.placement, plan)
            rows = handle.rows(begun)
            seen.append(len(events))
            mine.combine(rows, handle)
        return [", ".join(phase for phase, _ in part) for part in (events[seen[0] : seen[1]], events[seen[1] :])]

    assert board.run(carried) == [[DISPATCHED[algorithm], COMBINED[algorithm]]] * places.ranks


def test_each_chunk_has_one_gather_a_phase() -> None:
    """Dispatch: one before all first levels, one before the second level of each of three chunks, one at the end."""
    places = machine([[2, 2]])
    given = problem(places, slots=1, top_k=3, load="even", dtype=torch.float32, seed=6)
    board = Switchboard(places.ranks)

    def gathers(rank: int) -> int:
        mine = dispatcher(board, "halo", places, rank, chunks=3)
        events: list[Any] = []
        plan = mine.plan(given.expert_ids[rank], given.placement)
        with Gathers(events):
            begun, handle = mine.dispatch(
                given.tokens[rank], given.expert_ids[rank], given.weights[rank], given.placement, plan
            )
            handle.rows(begun)
        return len(events)

    assert board.run(gathers) == [1 + 3 + 1] * 4
