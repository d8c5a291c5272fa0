"""The plan of the hierarchical family: the routes that rows take from their tokens to their experts, and back.

Rows of the own node take one leg, inside it (phase 1 of Algorithm 1, arXiv 2605.05049). The others travel in chunks of
tokens, each a route of its own with one leg a level (phases 2 and 3), so that one chunk's leg between nodes may run
beside another's inside them. Deduplicated routes carry a token once for each domain that it enters and learn there,
from counts and an index a choice, which experts it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from piper_hpc.comm.channel import Channel, Pending
from piper_hpc.comm.dedup import Distinct, Fold, distinct
from piper_hpc.comm.plan import inverse
from piper_hpc.comm.tables import Tables, regroup


@dataclass(frozen=True)
class Parcel:
    """What every single choice takes along on a leg of a deduplicated route, beside rows that several choices share.

    index: for each choice sent, its place among those that arrived before (None on a first leg); send, receive:
    choices by peer.
    """

    index: torch.Tensor | None
    send: list[int]
    receive: list[int]

    @property
    def sent(self) -> int:
        """Choices sent."""
        return sum(self.send)


@dataclass(frozen=True)
class Leg:
    """One exchange of one route. send, receive: rows by peer of hop `level`; pack: for each row sent, its row among
    those that arrived before (None on a first leg); undo: how rows that come back become those that had arrived, by
    permutation or by adding up; parcel: of a deduplicated route."""

    level: int
    send: list[int]
    receive: list[int]
    pack: torch.Tensor | None = None
    undo: torch.Tensor | Fold | None = None
    parcel: Parcel | None = None

    @property
    def sent(self) -> int:
        """Rows sent."""
        return sum(self.send)

    @property
    def received(self) -> int:
        """Rows received."""
        return sum(self.receive)


@dataclass(frozen=True)
class RoutePlan:
    """One dispatch of one rank, used by dispatch, combine and the backward of both, and by recomputation.

    routes: legs of the own node's rows, then of each chunk. order: choice (token * top_k + choice) by route in sending
    order, int64 [tokens * top_k]; place: its inverse. first: token of each row first sent, own rows first. final: for
    each delivered row its index among the rows as they arrived, route by route; final_inverse: its inverse. offsets:
    where each local expert's rows end, int32. home: of a deduplicated plan, the sums by token of own rows and of all
    other rows that come back.
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
    home: tuple[Fold, Fold] | None

    @property
    def own_rows(self) -> int:
        """Rows first sent to the own node."""
        return self.routes[0][0].sent

    @property
    def choices_out(self) -> list[int]:
        """Choices that this rank passes on in the last leg of each route."""
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
    planner = _Planner(expert_ids, position_of_expert, tables, channels)
    planner.exchange_counts(dedup=dedup)
    own = planner.own_leg(dedup=dedup)
    order = planner.order()
    chunks, first = planner.chunk_legs(order, dedup=dedup)
    own_first = order[: own.sent] // planner.top_k
    final, offsets = planner.arrival([own, *(legs[-1] for legs in chunks)])
    home = None
    if dedup:
        home = (Fold.by(own_first, planner.tokens), Fold.by(first, planner.tokens))
    return RoutePlan(
        placement_version=placement_version,
        tokens=planner.tokens,
        top_k=planner.top_k,
        routes=((own,), *chunks),
        order=order,
        place=inverse(order),
        first=torch.cat((own_first, first)),
        final=final,
        final_inverse=inverse(final),
        offsets=offsets,
        home=home,
    )


class _Planner:
    """The steps of one plan, in order: counts of all levels, then the index of every leg."""

    def __init__(
        self,
        expert_ids: torch.Tensor,
        position_of_expert: torch.Tensor,
        tables: Tables,
        channels: Sequence[Channel],
    ) -> None:
        self.tables, self.channels = tables, channels
        self.tokens, self.top_k = expert_ids.shape
        self.positions = position_of_expert[expert_ids.reshape(-1)]
        self.device = expert_ids.device
        chunks = tables.chunks
        # Chunk c holds the tokens t with floor(t * chunks / tokens) = c.
        self.bounds = [-(-chunk * self.tokens // chunks) for chunk in range(chunks + 1)] if chunks else [0]
        token = torch.arange(self.tokens, device=self.device).repeat_interleave(self.top_k)
        self.chunk = token * chunks // max(self.tokens, 1)
        self.own = tables.is_own[self.positions]
        self.present = torch.zeros(0)

    def exchange_counts(self, *, dedup: bool) -> None:
        """Counts before and after every hop, and on the host the rows and choices that each peer sends and gets."""
        tables = self.tables
        experts, chunks = tables.is_own.numel(), tables.chunks
        own = self.positions.new_zeros(experts).scatter_add_(0, self.positions, self.own.long())
        sent_own = own.index_select(0, tables.own_positions)
        counts = self.positions.new_zeros(max(chunks, 1) * experts)
        counts.scatter_add_(0, self.chunk * experts + self.positions, (~self.own).long())
        counts = counts[: chunks * experts]
        self.counts = [counts]
        numbers: list[torch.Tensor] = []
        for level, table in enumerate(tables.levels):
            parts = [counts]
            if level == len(tables.levels) - 1:
                parts.insert(0, sent_own)
            rows = self._first_rows() if dedup and level == 0 else counts.new_zeros(chunks, table.peers)
            if dedup and level == 0:
                parts.append(rows.flatten())
            message = torch.cat(parts).index_select(0, table.message)
            received = message.new_empty(sum(table.from_peer))
            self.channels[level].exchange(received, message, table.from_peer, table.to_peer).wait()
            received = received.index_select(0, table.arrived)
            values = table.shape[0] * table.shape[1] * table.shape[2] * table.shape[3]
            own_values = received.numel() - values - (chunks * table.peers if dedup and level == 0 else 0)
            self.received_own = received[:own_values]
            after = received[own_values : own_values + values]
            got_rows = received[own_values + values :] if dedup and level == 0 else rows.flatten()
            out = rows.new_zeros(chunks, table.peers).index_add_(
                1, table.peer_of_block, counts.view(chunks, table.peer_of_block.numel())
            )
            into = rows.new_zeros(chunks, table.peers).index_add_(
                1, table.peer_of_source, after.view(table.shape).sum((2, 3))
            )
            numbers += [out.flatten(), into.flatten(), rows.flatten(), got_rows]
            counts = after
            self.counts.append(after)
        numbers += [sent_own.view(-1, tables.slots).sum(1), self.received_own.view(-1, tables.slots).sum(1)]
        self._read(torch.cat(numbers).tolist())

    def _first_rows(self) -> torch.Tensor:
        """Distinct (token, peer) pairs of the first hop by chunk and peer; `present` keeps which they are."""
        peers = self.tables.levels[0].peers
        cell = torch.arange(self.tokens, device=self.device).repeat_interleave(self.top_k) * peers
        cell = torch.where(self.own, self.tokens * peers, cell + self.tables.peer_of_position[self.positions])
        present = cell.new_zeros(self.tokens * peers + 1)
        present[cell] = 1
        self.present = present[:-1].view(self.tokens, peers)
        pairs = zip(self.bounds, self.bounds[1:], strict=False)
        listed = [self.present[low:high].sum(0) for low, high in pairs]
        return torch.stack(listed) if listed else present.new_zeros(0, peers)

    def _read(self, numbers: list[int]) -> None:
        """Take the host's copy of all counts apart."""
        taken = iter(numbers)

        def table(peers: int) -> list[list[int]]:
            return [[next(taken) for _ in range(peers)] for _ in range(self.tables.chunks)]

        # By level: choices sent, choices received, rows sent, rows received; each by chunk and peer.
        self.numbers = [[table(level.peers) for _ in range(4)] for level in self.tables.levels]
        self.own_send = [next(taken) for _ in range(self.tables.own_peers)]
        self.own_receive = [next(taken) for _ in range(self.tables.own_peers)]

    def own_leg(self, *, dedup: bool) -> Leg:
        """The leg of the own node's rows."""
        parcel = Parcel(None, self.own_send, self.own_receive) if dedup else None
        return Leg(len(self.tables.levels) - 1, self.own_send, self.own_receive, parcel=parcel)

    def order(self) -> torch.Tensor:
        """Choices in sending order: own ones by position, then each chunk by peer and position, tokens in order."""
        tables = self.tables
        blocks = tables.first_block.numel()
        far = tables.own_positions.numel() + self.chunk * blocks + tables.first_block[self.positions]
        return torch.argsort(torch.where(self.own, tables.own_block[self.positions], far), stable=True)

    def chunk_legs(self, order: torch.Tensor, *, dedup: bool) -> tuple[list[tuple[Leg, ...]], torch.Tensor]:
        """The legs of every chunk, and the token of each row that they send first."""
        if not dedup:
            legs = [self._plain(chunk) for chunk in range(self.tables.chunks)]
            return legs, order[sum(self.own_send) :] // self.top_k
        started = [self._start(chunk, order) for chunk in range(self.tables.chunks)]
        legs = [self._distinct(chunk, arrived, pending) for chunk, (_, arrived, pending) in enumerate(started)]
        tokens = [rows for rows, _, _ in started]
        return legs, torch.cat(tokens) if tokens else order[:0]

    def _plain(self, chunk: int) -> tuple[Leg, ...]:
        """Every choice is a row of its own, on every leg."""
        legs = []
        for level, table in enumerate(self.tables.levels):
            send, receive = self.numbers[level][0][chunk], self.numbers[level][1][chunk]
            pack = None
            if level:
                pack = regroup(self._chunk_counts(level, chunk), table.send_blocks, sum(send))
            legs.append(Leg(level, send, receive, pack, None if pack is None else inverse(pack)))
        return tuple(legs)

    def _start(self, chunk: int, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Pending]:
        """The first leg of a deduplicated chunk: tokens of its rows, and the row of each choice that comes, relative
        to its peer's first, which is under way."""
        choices = self.numbers[0]
        start = sum(self.own_send) + sum(map(sum, choices[0][:chunk]))
        mine = order[start : start + sum(choices[0][chunk])]
        low, high = self.bounds[chunk], self.bounds[chunk + 1]
        found = distinct(
            self.present[low:high],
            mine // self.top_k - low,
            self.tables.peer_of_position[self.positions[mine]],
            self.numbers[0][2][chunk],
        )
        arrived, pending = self._send_index(0, chunk, found.index)
        return found.pack + low, arrived, pending

    def _send_index(self, level: int, chunk: int, index: torch.Tensor) -> tuple[torch.Tensor, Pending]:
        send, receive = self.numbers[level][0][chunk], self.numbers[level][1][chunk]
        arrived = index.new_empty(sum(receive), dtype=torch.int32)
        return arrived, self.channels[level].exchange(arrived, index.to(torch.int32), receive, send)

    def _distinct(self, chunk: int, arrived: torch.Tensor, pending: Pending) -> tuple[Leg, ...]:
        """A token is one row on all legs but the last, where every choice is one."""
        out, into, send, receive = (each[chunk] for each in self.numbers[0])
        legs = [Leg(0, send, receive, parcel=Parcel(None, out, into))]
        last = len(self.tables.levels) - 1
        for level in range(1, last + 1):
            pending.wait()
            rows = legs[-1].received
            row = _absolute(arrived, legs[-1])
            out, into = self.numbers[level][0][chunk], self.numbers[level][1][chunk]
            table = self.tables.levels[level]
            index = regroup(self._chunk_counts(level, chunk), table.send_blocks, sum(out))
            row = row.index_select(0, index)
            if level == last:
                legs.append(Leg(level, out, into, row, Fold.by(row, rows), Parcel(index, out, into)))
                break
            peer = torch.repeat_interleave(torch.tensor(out, device=self.device), output_size=len(row))
            found, send, receive = self._middle(level, row, peer, rows)
            arrived, pending = self._send_index(level, chunk, found.index)
            legs.append(Leg(level, send, receive, found.pack, Fold.by(found.pack, rows), Parcel(index, out, into)))
        return tuple(legs)

    def _middle(
        self, level: int, row: torch.Tensor, peer: torch.Tensor, rows: int
    ) -> tuple[Distinct, list[int], list[int]]:
        """Distinct (row, peer) pairs of a middle level; their numbers are known only now, so they are exchanged."""
        peers = self.tables.levels[level].peers
        present = row.new_zeros(rows * peers)
        present[row * peers + peer] = 1
        present = present.view(rows, peers)
        counts = present.sum(0)
        received = torch.empty_like(counts)
        self.channels[level].exchange(received, counts, [1] * peers, [1] * peers).wait()
        send, receive = torch.stack((counts, received)).tolist()
        return distinct(present, row, peer, send), send, receive

    def _chunk_counts(self, level: int, chunk: int) -> torch.Tensor:
        return self.counts[level].view(self.tables.chunks, -1)[chunk]

    def arrival(self, last: Sequence[Leg]) -> tuple[torch.Tensor, torch.Tensor]:
        """The order that brings arrived rows into the flat order, and where each local expert's rows end."""
        counts = torch.cat((self.received_own, self.counts[-1]))
        final = regroup(counts, self.tables.final_blocks, sum(leg.received for leg in last))
        offsets = counts.view(-1, self.tables.slots).sum(0).cumsum(0).to(torch.int32)
        return final, offsets


def _absolute(arrived: torch.Tensor, leg: Leg) -> torch.Tensor:
    """Rows of choices among all rows that a leg received, from rows relative to each peer's first."""
    assert leg.parcel is not None
    rows, choices = (torch.tensor(each, device=arrived.device) for each in (leg.receive, leg.parcel.receive))
    starts = torch.repeat_interleave(rows.cumsum(0) - rows, choices, output_size=arrived.numel())
    return arrived.long() + starts
