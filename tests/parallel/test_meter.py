"""What the meter counts is what ranks send."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.parallel.meter import ByteCountingDispatcher, SentBytes
from piper_hpc.spec import ALGORITHMS, LEVELS
from tests.comm.lockstep import Message, Switchboard, dispatcher
from tests.comm.test_algorithms import problem
from tests.comm.test_hierarchy import machine


def kind_of(message: Message) -> str:
    """Counts are int64; beside them rows are the only messages of two dimensions."""
    if message.dtype == torch.int64:
        return "counts"
    return "payload" if message.dimensions == 2 else "metadata"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bytes_of_a_step_are_those_sent(algorithm: str, dtype: torch.dtype) -> None:
    """By level, of dispatch and combine, forward and backward, with weights of the rows' type; nothing is left over."""
    places = machine([[2, 2], [2, 1]])
    given = problem(places, slots=2, top_k=3, load="even", dtype=dtype, seed=7)
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)

    def step(rank: int) -> tuple[SentBytes, SentBytes]:
        meter = ByteCountingDispatcher(dispatcher(board, algorithm, places, rank, hierarchy, chunks=2), places, rank)
        tokens, weights = given.tokens[rank].clone().requires_grad_(), given.weights[rank].clone().requires_grad_()
        begun, handle = meter.dispatch(tokens, given.expert_ids[rank], weights, given.placement)
        rows = handle.rows(begun)
        meter.combine(rows, handle).sum().backward()
        return meter.pop_sent_bytes(), meter.pop_sent_bytes()

    taken = board.run(step)
    sent: Counter[tuple[str, str]] = Counter()
    for rank, calls in enumerate(board.calls):
        for _, message in calls:
            for peer, size in message.bytes_to.items():
                sent[kind_of(message), places.tier(rank, peer)] += size
    for level in LEVELS:
        assert sum(first.payload_bytes[level] for first, _ in taken) == sent["payload", level] > 0
        assert sum(first.metadata_bytes[level] for first, _ in taken) == sent["metadata", level]
    between = sum(sent["metadata", level] for level in LEVELS)
    assert (between > 0) == ALGORITHMS[algorithm].dedup
    assert all(second == SentBytes() for _, second in taken), "asked again, nothing was sent since"
