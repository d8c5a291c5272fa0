"""The 1F1B pipeline as a timeline: when every stage computes, waits for a message, and waits for its sender."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """One forward (`F`) or backward (`B`) of a micro-batch on a stage, in seconds from the start of the step."""

    kind: str
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What each stage does, by stage; a stage's end_s = its work + bubble_s + p2p_s.

    bubble_s: waiting before the sender had posted the message; p2p_s: waiting for the transfer after it had.
    """

    end_s: tuple[float, ...]
    bubble_s: tuple[float, ...]
    p2p_s: tuple[float, ...]
    slots: tuple[tuple[Slot, ...], ...]

    @property
    def step_s(self) -> float:
        """When the last stage to finish has finished."""
        return max(self.end_s)


def order_1f1b(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    """The work of `stage` in order: PP - i forwards (fewer if there are fewer), then backward and forward in turn."""
    warm_up = min(stages - stage, micro_batches)
    order = [("F", index) for index in range(warm_up)]
    for index in range(micro_batches):
        order.append(("B", index))
        if warm_up + index < micro_batches:
            order.append(("F", warm_up + index))
    return order


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Micro-batches whose activations stage i keeps at once: PP - i, never more than there are (Eq 4)."""
    return min(stages - stage, micro_batches)


def simulate_1f1b(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    micro_batches: int,
    send_forward_s: Sequence[float] = (),
    send_backward_s: Sequence[float] = (),
) -> Timeline:
    """Play one step of 1F1B; all times are of one micro-batch.

    forward_s, backward_s: by stage. send_forward_s[i]: a message from stage i to i+1; send_backward_s[i]: its
    gradient from stage i+1 to i (both default to 0). A message moves once both ends have posted it, as on gloo and
    NCCL, and torch's schedule posts a receive only when it needs it: so every transfer is waited for.
    """
    stages = len(forward_s)
    down = list(send_forward_s) or [0.0] * (stages - 1)
    up = list(send_backward_s) or [0.0] * (stages - 1)
    orders = [order_1f1b(stage, stages, micro_batches) for stage in range(stages)]
    clock, bubble, p2p = [0.0] * stages, [0.0] * stages, [0.0] * stages
    forward_posted: list[list[float]] = [[] for _ in range(stages)]
    backward_posted: list[list[float]] = [[] for _ in range(stages)]
    slots: list[list[Slot]] = [[] for _ in range(stages)]

    def message(kind: str, stage: int, index: int) -> tuple[float, float] | None:
        """(posted, transfer) of the message this work needs; None while its sender has not posted it."""
        is_forward = kind == "F"
        if stage == (0 if is_forward else stages - 1):
            return 0.0, 0.0
        sender = stage - 1 if is_forward else stage + 1
        posted = (forward_posted if is_forward else backward_posted)[sender]
        if index >= len(posted):
            return None
        return posted[index], down[sender] if is_forward else up[stage]

    pending = set(range(stages))
    while pending:
        for stage in sorted(pending):
            order = orders[stage]
            while len(slots[stage]) < len(order):
                kind, index = order[len(slots[stage])]
                sent = message(kind, stage, index)
                if sent is None:
                    break
                posted, transfer = sent
                bubble[stage] += max(0.0, posted - clock[stage])
                p2p[stage] += transfer
                start = max(clock[stage], posted) + transfer
                end = start + (forward_s[stage] if kind == "F" else backward_s[stage])
                (forward_posted if kind == "F" else backward_posted)[stage].append(end)
                slots[stage].append(Slot(kind, index, start, end))
                clock[stage] = end
            else:
                pending.discard(stage)
    return Timeline(tuple(clock), tuple(bubble), tuple(p2p), tuple(map(tuple, slots)))


def closed_form_1f1b(forward_s: float, backward_s: float, stages: int, micro_batches: int) -> float:
    """Seconds of a step with equal stages and free messages: (M + PP - 1) (f + b)."""
    return (micro_batches + stages - 1) * (forward_s + backward_s)


def bubble_fraction(stages: int, micro_batches: int) -> float:
    """Idle share of a step with equal stages: (PP - 1) / (M + PP - 1), for GPipe and 1F1B alike."""
    return (stages - 1) / (micro_batches + stages - 1)
