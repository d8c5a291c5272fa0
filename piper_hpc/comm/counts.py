"""Counts of a plan: how many choices and rows this rank sends to and receives from whom, one all-to-all a level.

A choice is one of a token's top_k experts. Choices for ranks of the own node (`local`) take the last hop alone; the
others (`remote`) take every hop, in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import prod
from typing import Any

import torch

from piper_hpc.comm.channel import Channel, Work, wait_on_host
from piper_hpc.comm.tables import LevelTable, Tables

ByChunk = list[list[int]]
"""Numbers by chunk and peer, on the host."""


@dataclass(frozen=True)
class ChoiceCounts:
    """The choices of one rank, counted. is_local: of each choice, whether its expert is on the own node, bool [tokens *
    top_k]; chunk: of each choice, that of its token, int64 [tokens * top_k].

    bounds: tokens at which chunks begin and end; present: 1 where a token goes through a peer of the first level, int64
    [tokens, peers], of no peers without deduplication; local: choices by block of the own node, int64 [ranks * slots];
    remote: those for other nodes by chunk and expert, int64 [chunks * experts].
    """

    is_local: torch.Tensor
    chunk: torch.Tensor
    bounds: list[int]
    present: torch.Tensor
    local: torch.Tensor
    remote: torch.Tensor


@dataclass(frozen=True)
class LevelCounts:
    """Choices that a rank sends and receives at one level, by chunk and peer: on the device, int64 [chunks, peers], and
    the same numbers on the host."""

    send: torch.Tensor
    recv: torch.Tensor
    send_on_host: ByChunk
    recv_on_host: ByChunk


@dataclass(frozen=True)
class Counts:
    """All counts of one plan. levels: remote choices by level; blocks_after: counts by block after each level,
    flattened [chunks, sources, targets, slots]; local_after: those of the local rows received [ranks * slots];
    local_send, local_recv: local rows by rank of the node; send_rows, recv_rows: rows of the first level where choices
    share them, else of no peers."""

    choices: ChoiceCounts
    levels: list[LevelCounts]
    blocks_after: list[torch.Tensor]
    local_after: torch.Tensor
    local_send: list[int]
    local_recv: list[int]
    send_rows: ByChunk
    recv_rows: ByChunk


def all_to_all_counts(
    positions: torch.Tensor, tokens: int, tables: Tables, channels: Sequence[Channel], *, dedup: bool
) -> Counts:
    """Count the choices `positions`, int64 [tokens * top_k], and send the counts level by level to every rank that
    relays or receives them; collective over `channels`, one a level. The host waits once, for all levels together."""
    choices = count(positions, tokens, tables, dedup=dedup)
    shared, nothing = by_chunk(choices.present, choices.bounds), positions.new_zeros(0)
    works: list[Work] = []
    received: list[tuple[torch.Tensor, ...]] = []
    for level, (table, channel) in enumerate(zip(tables.levels, channels, strict=True)):
        local = choices.local if level == len(tables.levels) - 1 else nothing
        sent = (local, received[-1][1], nothing) if level else (local, choices.remote, shared.flatten())
        work, arrived = _all_to_all_level(sent, table, channel)
        works.append(work)
        received.append(arrived)
    after, local_after = [blocks for _, blocks, _ in received], received[-1][0]
    shared_recv = received[0][2].view_as(shared)
    sends = [
        _send_by_peer(table, held) for table, held in zip(tables.levels, [choices.remote, *after[:-1]], strict=True)
    ]
    recvs = [_recv_by_peer(table, blocks) for table, blocks in zip(tables.levels, after, strict=True)]
    rows = [each.view(-1, tables.slots).sum(1) for each in (choices.local, local_after)]
    wait_on_host(works)
    local_send, local_recv, send_rows, recv_rows, *by_level = on_host([*rows, shared, shared_recv, *sends, *recvs])
    levels = zip(sends, recvs, by_level[: len(sends)], by_level[len(sends) :], strict=True)
    return Counts(
        choices=choices,
        levels=[LevelCounts(*each) for each in levels],
        blocks_after=after,
        local_after=local_after,
        local_send=local_send,
        local_recv=local_recv,
        send_rows=send_rows,
        recv_rows=recv_rows,
    )


def count(positions: torch.Tensor, tokens: int, tables: Tables, *, dedup: bool) -> ChoiceCounts:
    """Count the choices `positions`, int64 [tokens * top_k], of this rank."""
    chunks, experts = tables.chunks, tables.is_local.numel()
    token = torch.arange(tokens, device=positions.device).repeat_interleave(positions.numel() // max(tokens, 1))
    # Chunk c holds the tokens t with floor(t * chunks / tokens) = c.
    chunk = token * chunks // max(tokens, 1)
    bounds = [-(-part * tokens // chunks) for part in range(chunks + 1)] if chunks else [0]
    is_local = tables.is_local[positions]
    local = positions.new_zeros(experts).scatter_add_(0, positions, is_local.long())
    remote = positions.new_zeros(max(chunks, 1) * experts)
    remote = remote.scatter_add_(0, chunk * experts + positions, (~is_local).long())[: chunks * experts]
    present = positions.new_zeros(tokens, 0)
    if dedup and chunks:
        present = _present(token, torch.where(is_local, -1, tables.peer_of_position[positions]), tokens, tables)
    return ChoiceCounts(is_local, chunk, bounds, present, local.index_select(0, tables.local_positions), remote)


def by_chunk(present: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
    """Sums of `present`, int64 [rows, peers], over the rows of each chunk, which begin and end at `bounds`: int64
    [chunks, peers]."""
    if not present.shape[1]:
        return present.new_zeros(len(bounds) - 1, 0)
    return torch.stack([present[low:high].sum(0) for low, high in pairwise(bounds)])


def on_host(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Integer tensors as nested lists, read in one copy from the device."""
    numbers = iter(torch.cat([each.flatten() for each in tensors]).tolist())

    def read(shape: Sequence[int]) -> list[Any]:
        if len(shape) == 1:
            return list(islice(numbers, shape[0]))
        return [read(shape[1:]) for _ in range(shape[0])]

    return [read(each.shape) for each in tensors]


def _all_to_all_level(
    sent: tuple[torch.Tensor, ...], table: LevelTable, channel: Channel
) -> tuple[Work, tuple[torch.Tensor, ...]]:
    """All-to-all of the counts (local, blocks, rows) of one level, each flattened: the work, waited for on the device,
    and the same three as received."""
    local, _, rows = sent
    message = torch.cat(sent).index_select(0, table.message)
    buffer = message.new_empty(sum(table.from_peer))
    work = channel.all_to_all(buffer, message, table.from_peer, table.to_peer)
    work.wait()
    received = buffer.index_select(0, table.arrived)
    return work, received.split([local.numel(), prod(table.shape), rows.numel()])


def _send_by_peer(table: LevelTable, held: torch.Tensor) -> torch.Tensor:
    """Choices that go to each peer of the level, of those `held` by block before it: int64 [chunks, peers]."""
    blocks = held.view(table.shape[0], len(table.peer_of_block))
    return blocks.new_zeros(len(blocks), table.peers).index_add_(1, table.peer_of_block, blocks)


def _recv_by_peer(table: LevelTable, held: torch.Tensor) -> torch.Tensor:
    """Choices that come from each peer of the level, of those `held` by block after it: int64 [chunks, peers]."""
    by_source = held.view(table.shape).sum((2, 3))
    return by_source.new_zeros(len(by_source), table.peers).index_add_(1, table.peer_of_source, by_source)


def _present(token: torch.Tensor, peer: torch.Tensor, tokens: int, tables: Tables) -> torch.Tensor:
    """int64 [tokens, peers]: 1 where a token has a choice that goes through the peer; peer -1 is none."""
    peers = tables.levels[0].peers
    marks = token.new_zeros(tokens * peers + 1)
    marks[torch.where(peer < 0, tokens * peers, token * peers + peer)] = 1
    return marks[:-1].view(tokens, peers)
