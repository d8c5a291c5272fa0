"""Plays the orders of all ranks with times: who starts when, and what a rank waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.schedule.orders import Action


class Slot(NamedTuple):
    """One action on a rank, in seconds from the start of the step; p2p_s: the exposed transfer just before it."""

    action: Action
    start_s: float
    end_s: float
    p2p_s: float = 0.0

    @property
    def kind(self) -> str:
        """F, B, I, W or FB."""
        return self.action.kind

    @property
    def micro_batch(self) -> int:
        """The micro-batch; of an overlapped pair, the forward's."""
        return self.action.micro_batch

    @property
    def chunk(self) -> int:
        """The rank's chunk; of an overlapped pair, the forward's."""
        return self.action.chunk


@dataclass(frozen=True)
class Costs:
    """Seconds of one micro-batch.

    seconds: of every kind (F, B, I, W), by global stage; down, up: of a message over the boundary after a stage, to
    the next stage and back; saved: what an overlapped pair saves, by rank.
    """

    seconds: dict[str, list[float]]
    down: list[float]
    up: list[float]
    saved: list[float]


def play(
    orders: Sequence[Sequence[Action]],
    place: Sequence[Sequence[int]],
    micro_batches: int,
    costs: Costs,
    blocking: bool,
) -> tuple[list[list[Slot]], list[float]]:
    """Slots and bubble seconds by rank of any orders; place[rank][chunk]: the global stage.

    A rank runs until it needs a message that nobody has posted, and goes on when somebody does: linear in actions.
    """
    down, up = costs.down, costs.up
    stages = len(down) + 1
    slots: list[list[Slot]] = [[] for _ in orders]
    bubble = [0.0] * len(orders)
    # When the activations of (stage, micro-batch) were posted, and behind them, when its gradients were.
    gradients = stages * micro_batches
    posted: list[float | None] = [None] * (2 * gradients)
    waiting: dict[int, int] = {}
    ready = deque(range(len(orders)))
    while ready:
        rank = ready.popleft()
        order, of_rank, own = orders[rank], slots[rank], place[rank]
        now = of_rank[-1].end_s if of_rank else 0.0
        for position in range(len(of_rank), len(order)):
            action = order[position]
            seconds, last_sent, start = 0.0, 0.0, now
            missing, messages = -1, []
            for kind, index, chunk, _ in (action,) if action.backward is None else action.parts:
                stage = own[chunk]
                seconds += costs.seconds[kind][stage]
                if kind == "W":
                    continue
                message = stage * micro_batches + index
                if kind == "F":
                    source, transfer = (message - micro_batches, down[stage - 1]) if stage else (-1, 0.0)
                elif stage < stages - 1:
                    source, transfer = gradients + message + micro_batches, up[stage]
                else:
                    source, transfer = message, 0.0  # the loss, of this stage's own forward
                messages.append(message if kind == "F" else gradients + message)
                if source < 0:
                    continue
                sent = posted[source]
                if sent is None:
                    missing = source
                    break
                last_sent = max(last_sent, sent)
                start = max(start, (max(now, sent) if blocking else sent) + transfer)
            if missing >= 0:
                waiting[missing] = rank
                break
            if action.backward is not None:
                seconds -= costs.saved[rank]
            could_start = max(now, last_sent)
            bubble[rank] += could_start - now
            now = start + seconds
            of_rank.append(Slot(action, start, now, start - could_start))
            for message in messages:
                posted[message] = now
                if message in waiting:
                    ready.append(waiting.pop(message))
    for rank, (order, of_rank) in enumerate(zip(orders, slots, strict=True)):
        if len(of_rank) < len(order):
            stuck = order[len(of_rank)]
            raise ResourceModelError(
                f"this order cannot proceed: rank {rank} waits for ever before {stuck.kind} of micro-batch "
                f"{stuck.micro_batch}, chunk {stuck.chunk}"
            )
    return slots, bubble
