"""Carrying a plan out: rows outward along its routes and home again, phases overlapped, relay buffers kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from piper_hpc.comm.channel import Channel, Pending
from piper_hpc.comm.dedup import Fold
from piper_hpc.comm.routes import RoutePlan
from piper_hpc.spec.exchange import Overlap

Weigh = Callable[[int, torch.Tensor], torch.Tensor]
"""What becomes of the rows of a route, by number, before its last leg outward or after it homeward."""


class Buffers:
    """Relay storage that is used again: what it hands out is valid until the same name is asked again.

    It grows to the largest exchange so far and never shrinks: routing that was uneven once may be so again at any step,
    and asking for memory in the middle of an exchange is what it is there to avoid. One place a name, dtype and device,
    and as many names as a plan has phases and chunks; it is freed with its dispatcher.
    """

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
        relays = [
            self._relay(f"outward {step}", [legs[step].received for legs in plan.routes[1:]], source)
            for step in range(plan.depth - 1)
        ]

        def post(route: int, step: int) -> Pending:
            leg, is_last = plan.routes[route][step], step == len(plan.routes[route]) - 1
            if leg.pack is not None:
                before, _ = relays[step - 1]
                packing = self._buffers.take(f"packed {route} {step}", leg.sent, source)
                sent[route] = torch.index_select(before, 0, leg.pack, out=packing)
            if is_last and weigh is not None:
                sent[route] = weigh(route, sent[route])
            received = into[route] if is_last else relays[step][1][route - 1]
            return self.channels[leg.level].exchange(received, sent[route], leg.receive, leg.send)

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
        # What each level gave back to the chunks, last level first; the first level gives back to where rows began.
        relays = []
        for step in range(plan.depth - 1):
            name = None if keep and step == 0 else f"homeward {step}"
            relays.append(self._relay(name, [legs[-1 - step].sent for legs in plan.routes[1:]], rows))
        own = rows.new_empty((plan.own_rows, *rows.shape[1:])) if keep else into[0]
        outputs = [own, *(relays[0][1] if relays else ())]

        def post(route: int, step: int) -> Pending:
            leg = plan.routes[route][-1 - step]
            if step:
                done = plan.routes[route][-step]
                if step == 1 and fold_last is not None:
                    current[route] = fold_last(route, outputs[route])
                elif isinstance(done.undo, Fold):
                    current[route] = done.undo(relays[step - 1][1][route - 1]).to(rows.dtype)
                elif done.undo is not None:
                    packing = self._buffers.take(f"undone {route} {step}", done.undo.numel(), rows)
                    current[route] = torch.index_select(relays[step - 1][0], 0, done.undo, out=packing)
            given = own if route == 0 else into[route] if step == plan.depth - 1 else relays[step][1][route - 1]
            return self.channels[leg.level].exchange(given, current[route], leg.send, leg.receive)

        self._drive(plan, post)
        return back, outputs

    def _relay(
        self, name: str | None, rows: Sequence[int], like: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Room for the rows of all chunks at one level, whole and by chunk; without a name it is not used again."""
        whole = (
            like.new_empty((sum(rows), *like.shape[1:])) if name is None else self._buffers.take(name, sum(rows), like)
        )
        return whole, whole.split(list(rows))

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
