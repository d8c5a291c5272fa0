"""Event simulation of all ranks' orders: when each action starts and ends, and what its rank waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec.orders import Action


class TimedAction(NamedTuple):
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
class StageTimes:
    """Seconds of each micro-batch, [stages * micro_batches] by stage.

    seconds: of every kind (F, B, I, W), by global stage; send_forward_s, send_backward_s: of a message over the
    boundary after a stage, to the next stage and back; overlap_s: what an overlapped pair saves, by rank.
    """

    seconds: dict[str, list[float]]
    send_forward_s: list[float]
    send_backward_s: list[float]
    overlap_s: list[float]


def simulate_orders(
    orders: Sequence[Sequence[Action]],
    stage_of_chunk: Sequence[Sequence[int]],
    micro_batches: int,
    costs: StageTimes,
    blocking: bool,
) -> tuple[list[list[TimedAction]], list[float]]:
    """Timed actions and bubble seconds by rank, for any orders; stage_of_chunk[rank][chunk]: the global stage.

    A rank runs until it needs a message that nobody has posted, and goes on when somebody does: linear in actions.
    """
    send_forward_s, send_backward_s = costs.send_forward_s, costs.send_backward_s
    stages = len(costs.seconds["F"]) // micro_batches
    timed_actions: list[list[TimedAction]] = [[] for _ in orders]
    bubble = [0.0] * len(orders)
    # When the activations of (stage, micro-batch) were posted, and behind them, when its gradients were.
    gradients = stages * micro_batches
    posted: list[float | None] = [None] * (2 * gradients)
    waiting: dict[int, int] = {}
    ready = deque(range(len(orders)))
    while ready:
        rank = ready.popleft()
        order, of_rank, own = orders[rank], timed_actions[rank], stage_of_chunk[rank]
        now = of_rank[-1].end_s if of_rank else 0.0
        for position in range(len(of_rank), len(order)):
            action = order[position]
            seconds, last_sent, start = 0.0, 0.0, now
            missing, messages = -1, []
            for kind, index, chunk, _ in (action,) if action.backward is None else action.parts:
                stage = own[chunk]
                message = stage * micro_batches + index
                seconds += costs.seconds[kind][message]
                if kind == "W":
                    continue
                if kind == "F":
                    source = message - micro_batches
                    transfer = send_forward_s[source] if stage else 0.0
                elif stage < stages - 1:
                    source, transfer = gradients + message + micro_batches, send_backward_s[message]
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
                seconds -= costs.overlap_s[rank]
            could_start = max(now, last_sent)
            bubble[rank] += could_start - now
            now = start + seconds
            of_rank.append(TimedAction(action, start, now, start - could_start))
            for message in messages:
                posted[message] = now
                if message in waiting:
                    ready.append(waiting.pop(message))
    for rank, (order, of_rank) in enumerate(zip(orders, timed_actions, strict=True)):
        if len(of_rank) < len(order):
            stuck = order[len(of_rank)]
            raise ResourceModelError(
                f"this order cannot proceed: rank {rank} waits for ever before {stuck.kind} of micro-batch "
                f"{stuck.micro_batch}, chunk {stuck.chunk}"
            )
    return timed_actions, bubble
