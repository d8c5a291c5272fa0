"""The plan of algorithms of several levels: the all-to-alls that take rows from tokens to experts, and back.

Rows for the own node (local) take one all-to-all, inside it: phase 1 of Algorithm 1, arXiv 2605.05049. The others
(remote) are sent in chunks of tokens, each by one all-to-all a level (phases 2 and 3), so that one chunk's between
nodes overlaps another's inside them. With deduplication a token is one row in each domain that it enters; from counts
and one index a choice the rank there knows which experts it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from piper_hpc.comm.channel import Channel, wait_on_host
from piper_hpc.comm.counts import ByChunk, Counts, all_to_all_counts, by_chunk, on_host
from piper_hpc.comm.dedup import SegmentSum, deduplicate
from piper_hpc.comm.flat_plan import inverse
from piper_hpc.comm.metadata import MetadataTransfer
from piper_hpc.comm.tables import Tables, regroup


@dataclass(frozen=True)
class Transfer:
    """One all-to-all of one part at `level`. send, recv: rows by peer of the level's hop.

    pack: for each row sent, its index among all that the level before received, of all chunks, int64 [rows sent] (None
    on a part's first level). unpack: how rows that combine brings back by this all-to-all become the rows that the
    level before had received: a gather index over those of all chunks, or the sums of this part's.
    """

    level: int
    send: list[int]
    recv: list[int]
    pack: torch.Tensor | None = None
    unpack: torch.Tensor | SegmentSum | None = None

    @property
    def send_total(self) -> int:
        """Rows sent in dispatch, received in combine."""
        return sum(self.send)

    @property
    def recv_total(self) -> int:
        """Rows received in dispatch, sent in combine."""
        return sum(self.recv)


@dataclass(frozen=True)
class DedupPlan:
    """What a deduplicated plan has beside. metadata: of all its levels but the last; last_order: for each choice that
    is sent at the last level its index among those that metadata brought, int64 [choices]; local, remote: sums by token
    of the rows that combine brings back from the own node and from all others."""

    metadata: tuple[MetadataTransfer, ...]
    last_order: torch.Tensor
    local: SegmentSum
    remote: SegmentSum


@dataclass(frozen=True)
class HierarchicalPlan:
    """One dispatch of one rank, used by dispatch, combine and the backward of both, and by recomputation.

    parts: the all-to-alls, by level, of the local rows (part 0) and of each chunk of remote rows (part 1 + chunk).
    order: choice (token * top_k + choice) by part in sending order, int64 [tokens * top_k]; inverse_order: its inverse.
    send_tokens: token of each row sent at a part's first level, part by part, int64 [rows].
    expert_order: for each row as the experts get it its index among the rows as they arrived, part by part, int64
    [rows]; arrival_order: its inverse. offsets: where each local expert's rows end, int32 [experts_per_rank].
    """

    placement_version: int
    tokens: int
    top_k: int
    parts: tuple[tuple[Transfer, ...], ...]
    order: torch.Tensor
    inverse_order: torch.Tensor
    send_tokens: torch.Tensor
    expert_order: torch.Tensor
    arrival_order: torch.Tensor
    offsets: torch.Tensor
    dedup: DedupPlan | None

    @property
    def depth(self) -> int:
        """Levels of the part that has most."""
        return max(map(len, self.parts))

    @property
    def local_rows(self) -> int:
        """Rows sent to the own node."""
        return self.parts[0][0].send_total

    @property
    def last_sends(self) -> list[int]:
        """Rows that this rank sends at the last level, which are one a choice, [parts]."""
        return [transfers[-1].send_total for transfers in self.parts]


def plan_hierarchical(
    expert_ids: torch.Tensor,
    position_of_expert: torch.Tensor,
    tables: Tables,
    channels: Sequence[Channel],
    *,
    dedup: bool,
    placement_version: int,
) -> HierarchicalPlan:
    """Plan the all-to-alls of every choice of `expert_ids`, int64 [tokens, top_k]; collective over all channels.

    position_of_expert: rank * experts_per_rank + slot of each logical expert, int64 [experts]. Counts take one
    all-to-all a level, which the host waits for and reads together; a deduplicated plan needs one more, with a wait of
    its own, for each middle level. On CUDA it also waits where arrays made of these counts go back to the device from
    pageable memory (`deduplicate`, `dedup_transfers`).
    """
    tokens, top_k = expert_ids.shape
    positions = position_of_expert[expert_ids.reshape(-1)]
    counts = all_to_all_counts(positions, tokens, tables, channels, dedup=dedup)
    local = Transfer(len(tables.levels) - 1, counts.local_send, counts.local_recv)
    order = _sending_order(positions, counts, tables)
    local_tokens, remote = order[: local.send_total] // top_k, order[local.send_total :]
    dedup_plan = None
    if dedup:
        peers = tables.peer_of_position[positions[remote]]
        chunks, remote_tokens, metadata, last_order = dedup_transfers(
            remote // top_k, peers, counts, tables, channels, inverse(position_of_expert)
        )
        local_experts = expert_ids.reshape(-1)[order[: local.send_total]]
        dedup_plan = DedupPlan(
            metadata,
            last_order,
            SegmentSum.by_expert(local_tokens, tokens, local_experts, len(position_of_expert)),
            SegmentSum.by(remote_tokens, tokens),
        )
    else:
        chunks, remote_tokens = plain_transfers(counts, tables), remote // top_k
    blocks = torch.cat((counts.local_after, counts.blocks_after[-1]))
    rows = local.recv_total + sum(transfers[-1].recv_total for transfers in chunks)
    expert_order = regroup(blocks, tables.expert_blocks, rows)
    return HierarchicalPlan(
        placement_version=placement_version,
        tokens=tokens,
        top_k=top_k,
        parts=((local,), *chunks),
        order=order,
        inverse_order=inverse(order),
        send_tokens=torch.cat((local_tokens, remote_tokens)),
        expert_order=expert_order,
        arrival_order=inverse(expert_order),
        offsets=blocks.view(-1, tables.slots).sum(0).cumsum(0).to(torch.int32),
        dedup=dedup_plan,
    )


def _sending_order(positions: torch.Tensor, counts: Counts, tables: Tables) -> torch.Tensor:
    """Choices, int64 [tokens * top_k]: local ones by position, then chunk by chunk by peer and position, then token."""
    blocks = tables.first_block.numel()
    remote = tables.local_positions.numel() + counts.choices.chunk * blocks + tables.first_block[positions]
    return torch.argsort(torch.where(counts.choices.is_local, tables.local_block[positions], remote), stable=True)


def plain_transfers(counts: Counts, tables: Tables) -> list[tuple[Transfer, ...]]:
    """The all-to-alls of each chunk, by level, where every choice is a row of its own."""
    levels = []
    bounds: list[int] = []
    for level, (table, of_level) in enumerate(zip(tables.levels, counts.levels, strict=True)):
        pack = unpack = None
        if level:
            pack = regroup(counts.blocks_after[level - 1], table.send_blocks, _total(of_level.send_on_host))
            unpack = inverse(pack)
        levels.append(_transfers(level, of_level.send_on_host, of_level.recv_on_host, pack, unpack, bounds))
        bounds = [0, *accumulate(map(sum, of_level.recv_on_host))]
    return list(zip(*levels, strict=True))


def dedup_transfers(
    token: torch.Tensor,
    peer: torch.Tensor,
    counts: Counts,
    tables: Tables,
    channels: Sequence[Channel],
    expert_of_position: torch.Tensor,
) -> tuple[list[tuple[Transfer, ...]], torch.Tensor, tuple[MetadataTransfer, ...], torch.Tensor]:
    """The all-to-alls of each chunk, by level, where a token is one row at all levels but the last.

    token, peer: of each remote choice in sending order, int64 [choices]; expert_of_position: logical, int64 [experts].
    A node's sums add by logical expert, which no move inside the node changes. Returns beside the transfers the token
    of each row sent at the first level, and `metadata` and `last_order` of DedupPlan.
    """
    if not tables.chunks:
        return [], token, (), token
    of_level, device = counts.levels[0], token.device
    send, recv = counts.send_rows, counts.recv_rows
    found = deduplicate(counts.choices.present, counts.choices.bounds, send, token, peer)
    send_tokens, index = found.pack, None
    levels, metadata = [_transfers(0, send, recv, None, None, ())], []
    for level in range(1, len(tables.levels)):
        transfer = MetadataTransfer.of(level - 1, of_level, tables.levels[level - 1])
        # Rows are numbered within their chunk and peer; from here on among all that arrived.
        row = transfer.dispatch(found.index.to(torch.int32), channels).long()
        metadata.append(transfer if index is None else transfer.after(index))
        arrived = torch.tensor(recv, device=device).flatten()
        by_peer = of_level.recv.flatten()
        row += torch.repeat_interleave(arrived.cumsum(0) - arrived, by_peer, output_size=row.numel())
        of_level, table = counts.levels[level], tables.levels[level]
        index = regroup(counts.blocks_after[level - 1], table.send_blocks, _total(of_level.send_on_host))
        row = row.index_select(0, index)
        bounds = [0, *accumulate(map(sum, recv))]
        if level == len(tables.levels) - 1:
            sizes = counts.blocks_after[level - 1].index_select(0, table.send_blocks)
            expert = expert_of_position[table.send_positions].repeat_interleave(sizes, output_size=row.numel())
            sums = SegmentSum.by_expert(row, bounds[-1], expert, len(expert_of_position))
            levels.append(_transfers(level, of_level.send_on_host, of_level.recv_on_host, row, sums, bounds))
            break
        peer = torch.arange(table.peers, device=device).repeat(tables.chunks)
        peer = torch.repeat_interleave(peer, of_level.send.flatten(), output_size=row.numel())
        present = row.new_zeros(bounds[-1], table.peers)
        present[row, peer] = 1
        send, recv = _all_to_all_rows(present, bounds, channels[level])
        found = deduplicate(present, bounds, send, row, peer)
        levels.append(_transfers(level, send, recv, found.pack, SegmentSum.by(found.pack, bounds[-1]), bounds))
    assert index is not None
    return list(zip(*levels, strict=True)), send_tokens, tuple(metadata), index


def _all_to_all_rows(present: torch.Tensor, bounds: list[int], channel: Channel) -> tuple[ByChunk, ByChunk]:
    """Rows to and from each peer of a middle level by chunk: its ranks send one another how many they deduplicated.

    present, bounds: as in `deduplicate`.
    """
    sent = by_chunk(present, bounds)
    by_peer = sent.T.contiguous()
    received = torch.empty_like(by_peer)
    ones = [1] * len(by_peer)
    work = channel.all_to_all(received, by_peer, ones, ones)
    work.wait()
    wait_on_host([work])
    send, recv = on_host([sent, received.T])
    return send, recv


def _transfers(
    level: int,
    send: ByChunk,
    recv: ByChunk,
    pack: torch.Tensor | None,
    unpack: torch.Tensor | SegmentSum | None,
    bounds: Sequence[int],
) -> list[Transfer]:
    """All chunks' all-to-alls of one level. bounds: where the rows that each chunk had received begin and end."""
    transfers = []
    for chunk, rows in enumerate(pairwise([0, *accumulate(map(sum, send))])):
        of_chunk = unpack
        if isinstance(unpack, SegmentSum):
            of_chunk = unpack.part(rows, (bounds[chunk], bounds[chunk + 1]))
        elif unpack is not None:
            of_chunk = unpack[bounds[chunk] : bounds[chunk + 1]]
        packed = None if pack is None else pack[slice(*rows)]
        transfers.append(Transfer(level, send[chunk], recv[chunk], packed, of_chunk))
    return transfers


def _total(by_chunk: ByChunk) -> int:
    return sum(map(sum, by_chunk))
