"""Move experts between the ranks of an expert group: weights, master and moments, bit for bit, between two steps.

A move goes between ranks of one expert group, so that every replica moves its own copy, or with ZeRO-1 its own slices.
All that leaves and arrives in a range of a tensor's elements is exchanged at once, and ranges are as long as
`STAGING_BYTES` allow: what arrives waits beside the tensor until all has left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from piper_hpc.parallel.parameters import Bucket, ParameterStore
from piper_hpc.spec.expert_placement import ExpertMove, ExpertPlacement, moves_between

STAGING_BYTES = 64 * 2**20
"""What a rank holds of arriving experts beside their places, at most (but for one element of each)."""


@dataclass(frozen=True)
class Migrated:
    """What a migration was for one rank. bytes: what it sent; seconds: how long it took, its peers' delay included."""

    bytes: int
    seconds: float


def migrate(
    store: ParameterStore,
    moments: Sequence[Mapping[str, torch.Tensor]],
    before: Sequence[ExpertPlacement],
    after: Sequence[ExpertPlacement],
    group: dist.ProcessGroup | None,
    *,
    staging_bytes: int = STAGING_BYTES,
) -> Migrated:
    """Bring the experts of this rank's layers from `before` to `after`, both by global layer, and rename them.

    Collective over `group`, the expert group, all of whose ranks give the same placements. moments: flat, of each of
    the store's buckets. Gradients stay: they are of the step that is over.
    """
    started_s, sent = time.monotonic(), 0
    rank = 0 if group is None else dist.get_rank(group)
    for bucket, of_bucket in zip(store.buckets, moments, strict=True):
        for layer in bucket.layers:
            moves = moves_between(before[layer], after[layer])
            if moves:
                for stack in stacks(bucket, of_bucket, layer):
                    sent += _exchange(stack, moves, rank, group, staging_bytes)
    store.relabel([placement.experts_of(rank) for placement in after])
    return Migrated(sent, time.monotonic() - started_s)


def stacks(bucket: Bucket, moments: Mapping[str, torch.Tensor], layer: int) -> Iterator[torch.Tensor]:
    """All that this rank keeps of the experts of `layer`, as views [experts_per_rank, elements], slot by slot."""
    kept = [bucket.master, *moments.values()]
    if bucket.master is bucket.weights:
        kept = kept[1:]
    ends = accumulate((slot.parameter.numel() for slot in bucket.slots), initial=0)
    cut_ends = accumulate((slot.slice_size for slot in bucket.slots), initial=0)
    for slot, start, cut_start in zip(bucket.slots, ends, cut_ends, strict=False):
        if slot.layer == layer:
            experts = len(slot.names)
            yield bucket.weights[start : start + slot.parameter.numel()].view(experts, -1)
            for flat in kept:
                yield flat[cut_start : cut_start + slot.slice_size].view(experts, -1)


def _exchange(
    stack: torch.Tensor,
    moves: Sequence[ExpertMove],
    rank: int,
    group: dist.ProcessGroup | None,
    staging_bytes: int,
) -> int:
    """Bring the rows of `stack` [experts_per_rank, elements] where `moves` say; the bytes that this rank sent."""
    leaving = [move for move in moves if move.source == rank and move.target != rank]
    staying = [move for move in moves if move.source == rank and move.target == rank]
    arriving = [move for move in moves if move.target == rank and move.source != rank]
    places = [move.target_slot for move in (*staying, *arriving)]
    if not places:
        return 0
    wide = max(1, staging_bytes // (len(places) * stack.element_size()))
    for start in range(0, stack.shape[1], wide):
        part = stack[:, start : start + wide]
        staged = part.new_empty(len(places), part.shape[1])
        for index, move in enumerate(staying):
            staged[index].copy_(part[move.source_slot])
        messages = [
            dist.P2POp(dist.irecv, staged[len(staying) + index], group=group, group_peer=move.source)
            for index, move in enumerate(arriving)
        ]
        messages += [
            dist.P2POp(dist.isend, part[move.source_slot], group=group, group_peer=move.target) for move in leaving
        ]
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        part[places] = staged
    return len(leaving) * stack.shape[1] * stack.element_size()
