"""The plan of the hierarchical family: the routes that rows take from their tokens to their experts, and back.

Rows of the own node take one leg, inside it (phase 1 of Algorithm 1, arXiv 2605.05049). The others travel in chunks of
tokens, each a route of its own with one leg a level (phases 2 and 3), so that one chunk's leg between nodes may run
beside another's inside them. Deduplicated routes carry a token once for each domain that it enters and learn there,
from counts and an index a choice, which experts it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from piper_hpc.comm.channel import Channel, settle
from piper_hpc.comm.counts import ByChunk, Counts, by_chunk, exchange_counts, on_host
from piper_hpc.comm.dedup import Fold, distinct
from piper_hpc.comm.parcels import Parcel
from piper_hpc.comm.plan import inverse
from piper_hpc.comm.tables import Tables, regroup


@dataclass(frozen=True)
class Leg:
    """One exchange of one route. send, receive: rows by peer of hop `level`.

    pack: for each row sent, its row among all that the leg before brought, of all chunks (None on a first leg); undo:
    how rows that come back by this leg, of all chunks, become those that had arrived: by permutation, or by adding up
    those of this route.
    """

    level: int
    send: list[int]
    receive: list[int]
    pack: torch.Tensor | None = None
    undo: torch.Tensor | Fold | None = None

    @property
    def sent(self) -> int:
        """Rows sent."""
        return sum(self.send)

    @property
    def received(self) -> int:
        """Rows received."""
        return sum(self.receive)


@dataclass(frozen=True)
class Sharing:
    """What a deduplicated plan has beside: the parcels of its levels but the last; where each choice of the last leg
    stands among those that came, [choices]; and the sums by token of own rows and of all others that come back."""

    parcels: tuple[Parcel, ...]
    last: torch.Tensor
    own: Fold
    far: Fold


@dataclass(frozen=True)
class RoutePlan:
    """One dispatch of one rank, used by dispatch, combine and the backward of both, and by recomputation.

    routes: legs of the own node's rows, then of each chunk. order: choice (token * top_k + choice) by route in sending
    order, int64 [tokens * top_k]; place: its inverse. first: token of each row first sent, own rows first. final: for
    each delivered row its index among the rows as they arrived, route by route; final_inverse: its inverse. offsets:
    where each local expert's rows end, int32. sharing: of a deduplicated plan.
    """

    placement_version: int
    tokens: int
    top_k: int
    routes: tuple[tuple[Leg, ...], ...]
    order: torch.Tensor
    place: torch.Tensor
    first: torch.Tensor
    final: torch.Tensor
    final_inverse: torch.Tensor
    offsets: torch.Tensor
    sharing: Sharing | None

    @property
    def depth(self) -> int:
        """Legs of the longest route."""
        return max(map(len, self.routes))

    @property
    def own_rows(self) -> int:
        """Rows first sent to the own node."""
        return self.routes[0][0].sent

    @property
    def passed_on(self) -> list[int]:
        """Choices that this rank sends in the last leg of each route."""
        return [legs[-1].sent for legs in self.routes]


def plan_routes(
    expert_ids: torch.Tensor,
    position_of_expert: torch.Tensor,
    tables: Tables,
    channels: Sequence[Channel],
    *,
    dedup: bool,
    placement_version: int,
) -> RoutePlan:
    """Plan the exchange of every choice of `expert_ids`, int64 [tokens, top_k]; collective over all channels.

    Counts are exchanged once a level, then read by the host in one synchronisation (one more, with another exchange of
    counts, for each middle level of a deduplicated plan).
    """
    tokens, top_k = expert_ids.shape
    positions = position_of_expert[expert_ids.reshape(-1)]
    counts = exchange_counts(positions, tokens, tables, channels, dedup=dedup)
    own = Leg(len(tables.levels) - 1, counts.own_send, counts.own_receive)
    order = _sending_order(positions, counts, tables)
    own_tokens, far = order[: own.sent] // top_k, order[own.sent :]
    sharing = None
    if dedup:
        peers = tables.peer_of_position[positions[far]]
        chunks, first, parcels, last = shared_legs(far // top_k, peers, counts, tables, channels)
        sharing = Sharing(parcels, last, Fold.by(own_tokens, tokens), Fold.by(first, tokens))
    else:
        chunks, first = plain_legs(counts, tables), far // top_k
    arrived = torch.cat((counts.own_after, counts.after[-1]))
    rows = own.received + sum(legs[-1].received for legs in chunks)
    final = regroup(arrived, tables.final_blocks, rows)
    return RoutePlan(
        placement_version=placement_version,
        tokens=tokens,
        top_k=top_k,
        routes=((own,), *chunks),
        order=order,
        place=inverse(order),
        first=torch.cat((own_tokens, first)),
        final=final,
        final_inverse=inverse(final),
        offsets=arrived.view(-1, tables.slots).sum(0).cumsum(0).to(torch.int32),
        sharing=sharing,
    )


def _sending_order(positions: torch.Tensor, counts: Counts, tables: Tables) -> torch.Tensor:
    """Choices: own ones by position, then each chunk by peer and position; tokens in order."""
    blocks = tables.first_block.numel()
    far = tables.own_positions.numel() + counts.choices.chunk * blocks + tables.first_block[positions]
    return torch.argsort(torch.where(counts.choices.is_own, tables.own_block[positions], far), stable=True)


def plain_legs(counts: Counts, tables: Tables) -> list[tuple[Leg, ...]]:
    """Legs of each chunk where every choice is a row of its own."""
    levels = []
    bounds: list[int] = []
    for level, (table, numbers) in enumerate(zip(tables.levels, counts.numbers, strict=True)):
        pack = undo = None
        if level:
            pack = regroup(counts.after[level - 1], table.send_blocks, _total(numbers.choices_out))
            undo = inverse(pack)
        levels.append(_legs(level, numbers.choices_out, numbers.choices_in, pack, undo, bounds))
        bounds = [0, *accumulate(map(sum, numbers.choices_in))]
    return list(zip(*levels, strict=True))


def shared_legs(
    token: torch.Tensor, peer: torch.Tensor, counts: Counts, tables: Tables, channels: Sequence[Channel]
) -> tuple[list[tuple[Leg, ...]], torch.Tensor, tuple[Parcel, ...], torch.Tensor]:
    """Legs of each chunk where a token is one row on all legs but the last.

    token, peer: of each choice for another node, in sending order. Returns beside the legs the token of each row first
    sent, and parcels and last leg's order as in `Sharing`.
    """
    if not tables.chunks:
        return [], token, (), token
    numbers, device = counts.numbers[0], token.device
    send, receive = counts.rows_out, counts.rows_in
    found = distinct(counts.choices.present, counts.choices.bounds, send, token, peer)
    first, index = found.pack, None
    levels, parcels = [_legs(0, send, receive, None, None, ())], []
    for level in range(1, len(tables.levels)):
        parcel = Parcel.of(level - 1, numbers, tables.levels[level - 1])
        # Rows are numbered within their chunk and peer; from here on among all that arrived.
        row = parcel.carry(found.index.to(torch.int32), channels).long()
        parcels.append(parcel if index is None else parcel.after(index))
        arrived = torch.tensor(receive, device=device).flatten()
        into = numbers.into.flatten()
        row += torch.repeat_interleave(arrived.cumsum(0) - arrived, into, output_size=row.numel())
        numbers, table = counts.numbers[level], tables.levels[level]
        index = regroup(counts.after[level - 1], table.send_blocks, _total(numbers.choices_out))
        row = row.index_select(0, index)
        bounds = [0, *accumulate(map(sum, receive))]
        if level == len(tables.levels) - 1:
            fold = Fold.by(row, bounds[-1])
            levels.append(_legs(level, numbers.choices_out, numbers.choices_in, row, fold, bounds))
            break
        peer = torch.arange(table.peers, device=device).repeat(tables.chunks)
        peer = torch.repeat_interleave(peer, numbers.out.flatten(), output_size=row.numel())
        present = row.new_zeros(bounds[-1], table.peers)
        present[row, peer] = 1
        send, receive = _exchange_rows(present, bounds, channels[level])
        found = distinct(present, bounds, send, row, peer)
        levels.append(_legs(level, send, receive, found.pack, Fold.by(found.pack, bounds[-1]), bounds))
    assert index is not None
    return list(zip(*levels, strict=True)), first, tuple(parcels), index


def _exchange_rows(present: torch.Tensor, bounds: list[int], channel: Channel) -> tuple[ByChunk, ByChunk]:
    """Rows to and from each peer of a middle level by chunk, whose numbers nobody knew before."""
    sent = by_chunk(present, bounds)
    by_peer = sent.T.contiguous()
    received = torch.empty_like(by_peer)
    ones = [1] * len(by_peer)
    exchange = channel.exchange(received, by_peer, ones, ones)
    exchange.wait()
    settle([exchange])
    send, receive = on_host([sent, received.T])
    return send, receive


def _legs(
    level: int,
    send: ByChunk,
    receive: ByChunk,
    pack: torch.Tensor | None,
    undo: torch.Tensor | Fold | None,
    bounds: Sequence[int],
) -> list[Leg]:
    """The legs of all chunks at one level. bounds: where the rows that had arrived for each chunk begin and end."""
    legs = []
    for chunk, rows in enumerate(pairwise([0, *accumulate(map(sum, send))])):
        part = undo
        if isinstance(undo, Fold):
            part = undo.part(rows, (bounds[chunk], bounds[chunk + 1]))
        elif undo is not None:
            part = undo[bounds[chunk] : bounds[chunk + 1]]
        legs.append(Leg(level, send[chunk], receive[chunk], None if pack is None else pack[slice(*rows)], part))
    return legs


def _total(by_chunk: ByChunk) -> int:
    return sum(map(sum, by_chunk))
