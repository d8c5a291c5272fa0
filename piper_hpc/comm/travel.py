"""Carrying a plan out: rows outward along its routes and home again, phases overlapped, relay buffers kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from piper_hpc.comm.channel import Channel, Pending
from piper_hpc.comm.dedup import Fold
from piper_hpc.comm.plan import inverse
from piper_hpc.comm.routes import Leg, Parcel, RoutePlan

Overlap = Literal["none", "own_first", "far_first"]
"""Order of the phases of Algorithm 1 (arXiv 2605.05049): V0 one after the other; V1 the own node's rows posted first,
then the other routes beside them; V2 posted last."""

Weigh = Callable[[int, torch.Tensor], torch.Tensor]
"""What becomes of the rows of a route, by number, before its last leg outward or after it homeward."""


class Buffers:
    """Relay storage that grows and is used again: what it hands out is valid until the same name is asked again."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised [rows, ...] with the row shape, dtype and device of `like`."""
        shape = (rows, *like.shape[1:])
        values = rows * like.shape[1:].numel()
        key = (name, like.dtype, like.device)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < values:
            kept = self._kept[key] = like.new_empty(values)
        return kept[:values].view(shape)


class Travel:
    """Moves rows of one plan at a time over `channels`, one a level. Every row moves as its whole first dimension."""

    def __init__(self, channels: Sequence[Channel], overlap: Overlap) -> None:
        self.channels = channels
        self._overlap = overlap
        self._buffers = Buffers()

    def outward(self, source: torch.Tensor, first: torch.Tensor, plan: RoutePlan, weigh: Weigh | None) -> torch.Tensor:
        """Rows source[first] to their experts: [rows, hidden] in the flat order.

        weigh: applied to what a rank sends in the last leg of each route.
        """
        packed = self._buffers.take("first", first.numel(), source)
        torch.index_select(source, 0, first, out=packed)
        sent = list(packed.split([legs[0].sent for legs in plan.routes]))
        arrived = self._buffers.take("arrived", plan.final.numel(), source)
        into = arrived.split([legs[-1].received for legs in plan.routes])

        def post(route: int, step: int) -> Pending:
            leg = plan.routes[route][step]
            is_last = step == len(plan.routes[route]) - 1
            if leg.pack is not None:
                packing = self._relay("packed", route, step, leg.sent, source)
                sent[route] = torch.index_select(sent[route], 0, leg.pack, out=packing)
            if is_last and weigh is not None:
                sent[route] = weigh(route, sent[route])
            received = into[route] if is_last else self._relay("outward", route, step, leg.received, source)
            pending = self.channels[leg.level].exchange(received, sent[route], leg.receive, leg.send)
            sent[route] = received
            return pending

        self._drive(plan, post)
        return arrived.index_select(0, plan.final)

    def homeward(
        self, rows: torch.Tensor, plan: RoutePlan, fold_last: Weigh | None = None, *, keep: bool = False
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Rows as `outward` delivered them back to where they were first sent: (rows by route in sending order, rows
        of every route as its last leg gave them back).

        fold_last: what a relay makes of the rows that the last leg gave back, instead of the leg's own `undo`. keep:
        whether the second result outlives the next call.
        """
        arrived = self._buffers.take("arrived", plan.final.numel(), rows)
        torch.index_select(rows, 0, plan.final_inverse, out=arrived)
        current = list(arrived.split([legs[-1].received for legs in plan.routes]))
        back = self._buffers.take("first", plan.first.numel(), rows)
        into = back.split([legs[0].sent for legs in plan.routes])
        outputs: list[torch.Tensor] = [rows] * len(plan.routes)

        def post(route: int, step: int) -> Pending:
            legs = plan.routes[route]
            leg = legs[-1 - step]
            if step:
                current[route] = self._undone(legs[-step], route, current[route], fold_last if step == 1 else None)
            if step == 0 and keep:
                given = rows.new_empty((leg.sent, *rows.shape[1:]))
            elif step == len(legs) - 1:
                given = into[route]
            else:
                given = self._relay("homeward", route, step, leg.sent, rows)
            if step == 0:
                outputs[route] = given
            source = current[route]
            current[route] = given
            return self.channels[leg.level].exchange(given, source, leg.send, leg.receive)

        self._drive(plan, post)
        return back, outputs

    def carry(self, weights: torch.Tensor, plan: RoutePlan) -> torch.Tensor:
        """Values of choices in sending order, own ones first, to where a last leg passes the choices on, by route."""
        current = list(weights.split([_parcel(legs[0]).sent for legs in plan.routes]))
        for step in range(max(map(len, plan.routes))):
            pending: list[Pending] = []
            for route, legs in enumerate(plan.routes):
                if step >= len(legs):
                    continue
                parcel = _parcel(legs[step])
                if parcel.index is not None:
                    current[route] = current[route].index_select(0, parcel.index)
                if step < len(legs) - 1:
                    source, current[route] = current[route], weights.new_empty(sum(parcel.receive))
                    channel = self.channels[legs[step].level]
                    pending.append(channel.exchange(current[route], source, parcel.receive, parcel.send))
            for each in pending:
                each.wait()
        return torch.cat(current)

    def bring(self, values: torch.Tensor, plan: RoutePlan) -> torch.Tensor:
        """The way back of `carry`."""
        current = list(values.split(plan.choices_out))
        for step in reversed(range(max(map(len, plan.routes)))):
            pending: list[Pending] = []
            for route, legs in enumerate(plan.routes):
                if step >= len(legs):
                    continue
                parcel = _parcel(legs[step])
                if step < len(legs) - 1:
                    source, current[route] = current[route], values.new_empty(parcel.sent)
                    channel = self.channels[legs[step].level]
                    pending.append(channel.exchange(current[route], source, parcel.send, parcel.receive))
            for each in pending:
                each.wait()
            for route, legs in enumerate(plan.routes):
                if step < len(legs) and (index := _parcel(legs[step]).index) is not None:
                    current[route] = current[route].index_select(0, inverse(index))
        return torch.cat(current)

    def _undone(self, leg: Leg, route: int, rows: torch.Tensor, fold_last: Weigh | None) -> torch.Tensor:
        if fold_last is not None:
            return fold_last(route, rows)
        assert leg.undo is not None
        return leg.undo(rows).to(rows.dtype) if isinstance(leg.undo, Fold) else rows.index_select(0, leg.undo)

    def _relay(self, direction: str, route: int, step: int, rows: int, like: torch.Tensor) -> torch.Tensor:
        return self._buffers.take(f"{direction} {route} {step}", rows, like)

    def _drive(self, plan: RoutePlan, post: Callable[[int, int], Pending]) -> None:
        """Post every leg of every route, each once the leg before it has arrived."""
        routes = list(range(len(plan.routes)))
        if self._overlap == "none":
            for route in routes:
                for step in range(len(plan.routes[route])):
                    post(route, step).wait()
            return
        if self._overlap == "far_first":
            routes = [*routes[1:], 0]
        pending: dict[int, Pending] = {}
        for step in range(max(map(len, plan.routes))):
            for route in routes:
                if step < len(plan.routes[route]):
                    if step:
                        pending[route].wait()
                    pending[route] = post(route, step)
        for route in routes:
            pending[route].wait()


def _parcel(leg: Leg) -> Parcel:
    assert leg.parcel is not None
    return leg.parcel
