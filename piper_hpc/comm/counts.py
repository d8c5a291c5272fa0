"""The counts half of a plan: how many choices and rows go to and come from whom, by level, exchanged once a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.tables import Tables

ByChunk = list[list[int]]
"""Numbers by chunk and peer, on the host."""


@dataclass(frozen=True)
class Numbers:
    """What a rank sends and receives at one level, by chunk and peer: choices, also on the device (out, into, both
    [chunks, peers]), and on the first level of a deduplicated plan rows, else zeros."""

    out: torch.Tensor
    into: torch.Tensor
    choices_out: ByChunk
    choices_in: ByChunk
    rows_out: ByChunk
    rows_in: ByChunk


@dataclass(frozen=True)
class Counts:
    """All counts of one plan. numbers: by level; after: counts by block after each level, flattened [chunks, sources,
    targets, slots]; own_after: those of the own node's rows [ranks, slots]; own_send, own_receive: rows by its ranks.

    Of each choice: is_own, and the chunk of its token. bounds: tokens where chunks begin and end; present
    [tokens, peers]: 1 where a token goes through a peer of the first level, empty where rows are not shared.
    """

    numbers: list[Numbers]
    after: list[torch.Tensor]
    own_after: torch.Tensor
    own_send: list[int]
    own_receive: list[int]
    is_own: torch.Tensor
    chunk: torch.Tensor
    bounds: list[int]
    present: torch.Tensor


def exchange_counts(
    positions: torch.Tensor, tokens: int, tables: Tables, channels: Sequence[Channel], *, dedup: bool
) -> Counts:
    """Count the choices `positions`, int64 [tokens * top_k], and tell every rank on their way; collective."""
    chunks, experts, slots = tables.chunks, tables.is_own.numel(), tables.slots
    top_k = positions.numel() // max(tokens, 1)
    token = torch.arange(tokens, device=positions.device).repeat_interleave(top_k)
    # Chunk c holds the tokens t with floor(t * chunks / tokens) = c.
    chunk = token * chunks // max(tokens, 1)
    bounds = [-(-part * tokens // chunks) for part in range(chunks + 1)] if chunks else [0]
    is_own = tables.is_own[positions]
    own = positions.new_zeros(experts).scatter_add_(0, positions, is_own.long())
    own = own.index_select(0, tables.own_positions)
    counts = positions.new_zeros(max(chunks, 1) * experts)
    counts = counts.scatter_add_(0, chunk * experts + positions, (~is_own).long())[: chunks * experts]
    present = positions.new_zeros(tokens, 0)
    if dedup and chunks:
        present = _present(token, torch.where(is_own, -1, tables.peer_of_position[positions]), tokens, tables)
    after: list[torch.Tensor] = []
    own_after = own
    tables_of: list[list[torch.Tensor]] = []
    for level, table in enumerate(tables.levels):
        shares = dedup and chunks > 0 and level == 0
        rows = counts.new_zeros(chunks, table.peers)
        if shares:
            rows = torch.stack([present[low:high].sum(0) for low, high in pairwise(bounds)])
        parts = [own, counts, rows.flatten()] if level == len(tables.levels) - 1 else [counts, rows.flatten()]
        message = torch.cat(parts).index_select(0, table.message)
        received = message.new_empty(sum(table.from_peer))
        channels[level].exchange(received, message, table.from_peer, table.to_peer).wait()
        values = chunks * table.shape[1] * table.shape[2] * slots
        pairs = chunks * table.peers if shares else 0
        came = received.index_select(0, table.arrived)
        own_after, counts_after, rows_after = came.split([came.numel() - values - pairs, values, pairs])
        sent = counts.view(chunks, table.peer_of_block.numel())
        out = rows.new_zeros(chunks, table.peers).index_add_(1, table.peer_of_block, sent)
        by_source = counts_after.view(table.shape).sum((2, 3))
        into = rows.new_zeros(chunks, table.peers).index_add_(1, table.peer_of_source, by_source)
        tables_of.append([out, into, rows, rows_after.view(chunks, table.peers) if shares else rows])
        after.append(counts_after)
        counts = counts_after
    flat = [each.flatten() for listed in tables_of for each in listed]
    host = iter(torch.cat([*flat, own.view(-1, slots).sum(1), own_after.view(-1, slots).sum(1)]).tolist())

    def read(peers: int) -> ByChunk:
        return [[next(host) for _ in range(peers)] for _ in range(chunks)]

    numbers = []
    for table, (out, into, _, _) in zip(tables.levels, tables_of, strict=True):
        numbers.append(Numbers(out, into, *(read(table.peers) for _ in range(4))))
    own_send, own_receive = ([next(host) for _ in tables.chain.own] for _ in range(2))
    return Counts(numbers, after, own_after, own_send, own_receive, is_own, chunk, bounds, present)


def _present(token: torch.Tensor, peer: torch.Tensor, tokens: int, tables: Tables) -> torch.Tensor:
    """[tokens, peers]: 1 where a token has a choice that goes through the peer; choices of peer -1 go through none."""
    peers = tables.levels[0].peers
    marks = token.new_zeros(tokens * peers + 1)
    marks[torch.where(peer < 0, tokens * peers, token * peers + peer)] = 1
    return marks[:-1].view(tokens, peers)
