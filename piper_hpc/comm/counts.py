"""The counts half of a plan: how many choices and rows go to and come from whom, by level, exchanged once a level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from math import prod
from typing import Any

import torch

from piper_hpc.comm.channel import Channel, Pending, settle
from piper_hpc.comm.tables import LevelTable, Tables

ByChunk = list[list[int]]
"""Numbers by chunk and peer, on the host."""


@dataclass(frozen=True)
class Choices:
    """The choices of one rank, counted. Of each: is_own, whether its expert is on the own node; the chunk of its token.

    bounds: tokens where chunks begin and end; present [tokens, peers]: 1 where a token goes through a peer of the first
    level, of no peers where rows are not shared; own: choices by block of the own node [ranks * slots]; far: those for
    other nodes by chunk and expert, [chunks * experts].
    """

    is_own: torch.Tensor
    chunk: torch.Tensor
    bounds: list[int]
    present: torch.Tensor
    own: torch.Tensor
    far: torch.Tensor


@dataclass(frozen=True)
class Numbers:
    """Choices that a rank sends and receives at one level, by chunk and peer: on the device (out, into, both [chunks,
    peers]) and on the host."""

    out: torch.Tensor
    into: torch.Tensor
    choices_out: ByChunk
    choices_in: ByChunk


@dataclass(frozen=True)
class Counts:
    """All counts of one plan. numbers: by level; after: counts by block after each level, flattened [chunks, sources,
    targets, slots]; own_after: those of the own node's rows [ranks * slots]; own_send, own_receive: rows by its ranks;
    rows_out, rows_in: rows of the first level where choices share them, else of no peers."""

    choices: Choices
    numbers: list[Numbers]
    after: list[torch.Tensor]
    own_after: torch.Tensor
    own_send: list[int]
    own_receive: list[int]
    rows_out: ByChunk
    rows_in: ByChunk


def exchange_counts(
    positions: torch.Tensor, tokens: int, tables: Tables, channels: Sequence[Channel], *, dedup: bool
) -> Counts:
    """Count the choices `positions`, int64 [tokens * top_k], and tell every rank on their way; collective."""
    choices = count(positions, tokens, tables, dedup=dedup)
    shared, nothing = by_chunk(choices.present, choices.bounds), positions.new_zeros(0)
    exchanges: list[Pending] = []
    came: list[tuple[torch.Tensor, ...]] = []
    for level, (table, channel) in enumerate(zip(tables.levels, channels, strict=True)):
        own = choices.own if level == len(tables.levels) - 1 else nothing
        parts = (own, came[-1][1], nothing) if level else (own, choices.far, shared.flatten())
        exchange, arrived = _tell(parts, table, channel)
        exchanges.append(exchange)
        came.append(arrived)
    after, own_after, shared_in = [blocks for _, blocks, _ in came], came[-1][0], came[0][2].view_as(shared)
    outs = [_sums_out(table, before) for table, before in zip(tables.levels, [choices.far, *after[:-1]], strict=True)]
    intos = [_sums_into(table, blocks) for table, blocks in zip(tables.levels, after, strict=True)]
    rows = [each.view(-1, tables.slots).sum(1) for each in (choices.own, own_after)]
    settle(exchanges)
    own_send, own_receive, rows_out, rows_in, *by_level = on_host([*rows, shared, shared_in, *outs, *intos])
    numbers = zip(outs, intos, by_level[: len(outs)], by_level[len(outs) :], strict=True)
    return Counts(
        choices=choices,
        numbers=[Numbers(*each) for each in numbers],
        after=after,
        own_after=own_after,
        own_send=own_send,
        own_receive=own_receive,
        rows_out=rows_out,
        rows_in=rows_in,
    )


def count(positions: torch.Tensor, tokens: int, tables: Tables, *, dedup: bool) -> Choices:
    """Count the choices `positions`, int64 [tokens * top_k], of this rank."""
    chunks, experts = tables.chunks, tables.is_own.numel()
    token = torch.arange(tokens, device=positions.device).repeat_interleave(positions.numel() // max(tokens, 1))
    # Chunk c holds the tokens t with floor(t * chunks / tokens) = c.
    chunk = token * chunks // max(tokens, 1)
    bounds = [-(-part * tokens // chunks) for part in range(chunks + 1)] if chunks else [0]
    is_own = tables.is_own[positions]
    own = positions.new_zeros(experts).scatter_add_(0, positions, is_own.long())
    far = positions.new_zeros(max(chunks, 1) * experts)
    far = far.scatter_add_(0, chunk * experts + positions, (~is_own).long())[: chunks * experts]
    present = positions.new_zeros(tokens, 0)
    if dedup and chunks:
        present = _present(token, torch.where(is_own, -1, tables.peer_of_position[positions]), tokens, tables)
    return Choices(is_own, chunk, bounds, present, own.index_select(0, tables.own_positions), far)


def by_chunk(present: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
    """Sums of `present` [rows, peers] over the rows of each chunk, which begin and end at `bounds`: [chunks, peers]."""
    if not present.shape[1]:
        return present.new_zeros(len(bounds) - 1, 0)
    return torch.stack([present[low:high].sum(0) for low, high in pairwise(bounds)])


def on_host(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Integer tensors as nested lists, read in one synchronisation."""
    numbers = iter(torch.cat([each.flatten() for each in tensors]).tolist())

    def read(shape: Sequence[int]) -> list[Any]:
        if len(shape) == 1:
            return list(islice(numbers, shape[0]))
        return [read(shape[1:]) for _ in range(shape[0])]

    return [read(each.shape) for each in tensors]


def _tell(
    parts: tuple[torch.Tensor, ...], table: LevelTable, channel: Channel
) -> tuple[Pending, tuple[torch.Tensor, ...]]:
    """Exchange the counts (own, blocks, rows) of one level, each flattened: the exchange, waited for, and what came."""
    own, _, rows = parts
    message = torch.cat(parts).index_select(0, table.message)
    received = message.new_empty(sum(table.from_peer))
    exchange = channel.exchange(received, message, table.from_peer, table.to_peer)
    exchange.wait()
    came = received.index_select(0, table.arrived)
    return exchange, came.split([own.numel(), prod(table.shape), rows.numel()])


def _sums_out(table: LevelTable, before: torch.Tensor) -> torch.Tensor:
    """Choices that go to each peer, of those that wait `before` the level: [chunks, peers]."""
    blocks = before.view(table.shape[0], len(table.peer_of_block))
    return blocks.new_zeros(len(blocks), table.peers).index_add_(1, table.peer_of_block, blocks)


def _sums_into(table: LevelTable, after: torch.Tensor) -> torch.Tensor:
    """Choices that come by each peer, of those that wait `after` the level: [chunks, peers]."""
    by_source = after.view(table.shape).sum((2, 3))
    return by_source.new_zeros(len(by_source), table.peers).index_add_(1, table.peer_of_source, by_source)


def _present(token: torch.Tensor, peer: torch.Tensor, tokens: int, tables: Tables) -> torch.Tensor:
    """[tokens, peers]: 1 where a token has a choice that goes through the peer; choices of peer -1 go through none."""
    peers = tables.levels[0].peers
    marks = token.new_zeros(tokens * peers + 1)
    marks[torch.where(peer < 0, tokens * peers, token * peers + peer)] = 1
    return marks[:-1].view(tokens, peers)
