"""Simulated timeline of one pipeline step: when every rank computes and waits, and the most activations it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.schedule.simulation import StageTimes, TimedAction, simulate_orders
from piper_hpc.spec.orders import Action, rank_order
from piper_hpc.spec.schedules import SPLIT_BACKWARD, schedule_problem, stage_of

T = TypeVar("T")
Times = Sequence[float | Sequence[float]]
"""Seconds by stage, or by boundary of stages: of every micro-batch, or of each."""


@dataclass(frozen=True)
class Timeline:
    """What each rank does, by rank; a rank's end_s = busy_s + bubble_s + p2p_s.

    bubble_s: waiting before the sender had posted the message; p2p_s: waiting for the transfer after it had;
    peak_held: the most that it holds at once, in the units given to `simulate`.
    """

    end_s: tuple[float, ...]
    busy_s: tuple[float, ...]
    bubble_s: tuple[float, ...]
    p2p_s: tuple[float, ...]
    peak_held: tuple[float, ...]
    timed_actions: tuple[tuple[TimedAction, ...], ...]

    @property
    def step_s(self) -> float:
        """When the last rank to finish has finished."""
        return max(self.end_s)


def peak_held(order: Sequence[Action], held: Sequence[float]) -> float:
    """The most that a rank holds at once with this order; `held[chunk]`: what one micro-batch of a chunk keeps.

    Kept from the start of its forward to the end of its backward; where that is split, all of it to the end of W, as
    arXiv 2401.10241 counts (an executor that frees a part after I holds less). Times do not matter to it.
    """
    alive = peak = 0.0
    for action in order:
        for part in action.parts:
            if part.kind == "F":
                alive += held[part.chunk]
                peak = max(peak, alive)
            elif part.kind != "I":
                alive -= held[part.chunk]
    return peak


def simulate(
    schedule: str,
    pp: int,
    micro_batches: int,
    forward_s: Times,
    backward_s: Times,
    *,
    weight_s: Times = (),
    send_forward_s: Times = (),
    send_backward_s: Times = (),
    overlap_s: Sequence[float] = (),
    held: Sequence[Sequence[float]] = (),
    blocking: bool = True,
    paired: bool = True,
) -> Timeline:
    """Simulate one step of `schedule` on `pp` ranks; every time is of one micro-batch, in seconds: a number where all
    take as long, else one for each.

    forward_s, backward_s: by global stage (PP * vpp of them); backward_s is the whole backward, weight_s[s] the share
    of it that is the weight gradient (required where the schedule splits it). send_forward_s[s]: a message from stage
    s to s+1; send_backward_s[s]: its gradient back (both 0 unless given; always 0 between two stages of one rank).
    overlap_s[r]: what an overlapped pair on rank r saves against forward then backward. held[r][c]: what a micro-batch
    of chunk c keeps on rank r, in any unit (1 unless given).

    blocking: a message moves once both ends have posted it, and a receive is posted when it is needed, so that every
    transfer is waited for (torch's schedules of one order, on gloo and NCCL). Otherwise it moves as soon as it is sent,
    and only delays its receiver (this project's executor, whose receives are posted ahead). Links are never shared or
    full; a sender never waits. paired: an overlapped pair begins with the messages of both, and posts at its end;
    otherwise they run one after the other, as torch runs them, and overlap_s saves nothing.

    Raises ResourceModelError for degrees that the schedule does not have and for lists of the wrong length.
    """
    vpp = len(forward_s) // pp if pp else 0
    stages = pp * vpp
    broken = schedule_problem(schedule, pp, vpp, micro_batches)
    if broken is not None:
        raise ResourceModelError(broken)
    if schedule in SPLIT_BACKWARD and not weight_s:
        raise ResourceModelError(f"schedule {schedule} splits the backward: weight_s needs {stages} values")
    forward = _by_micro_batch("forward_s", forward_s, [True] * stages, micro_batches)
    weight = _by_micro_batch("weight_s", weight_s, [True] * stages, micro_batches)
    backward = _by_micro_batch("backward_s", backward_s, [True] * stages, micro_batches)
    stage_of_chunk = [[stage_of(schedule, rank, chunk, pp) for chunk in range(vpp)] for rank in range(pp)]
    rank_of = {stage: rank for rank, of_rank in enumerate(stage_of_chunk) for stage in of_rank}
    crosses = [rank_of[stage] != rank_of[stage + 1] for stage in range(stages - 1)]
    costs = StageTimes(
        seconds={
            "F": forward,
            "B": backward,
            "I": [whole - share for whole, share in zip(backward, weight, strict=True)],
            "W": weight,
        },
        send_forward_s=_by_micro_batch("send_forward_s", send_forward_s, crosses, micro_batches),
        send_backward_s=_by_micro_batch("send_backward_s", send_backward_s, crosses, micro_batches),
        overlap_s=list(_values_or_zeros("overlap_s", overlap_s, pp)),
    )
    orders = [rank_order(schedule, rank, pp, vpp, micro_batches) for rank in range(pp)]
    if not paired:
        orders = [[part for action in order for part in action.parts] for order in orders]
    kept = list(held) or [[1.0] * vpp] * pp
    if [len(of_rank) for of_rank in kept] != [vpp] * pp:
        raise ResourceModelError(f"held needs {vpp} values for each of {pp} ranks")
    timed_actions, bubble = simulate_orders(orders, stage_of_chunk, micro_batches, costs, blocking)
    end = [of_rank[-1].end_s for of_rank in timed_actions]
    return Timeline(
        end_s=tuple(end),
        busy_s=tuple(sum(timed.end_s - timed.start_s for timed in of_rank) for of_rank in timed_actions),
        bubble_s=tuple(bubble),
        p2p_s=tuple(sum(timed.p2p_s for timed in of_rank) for of_rank in timed_actions),
        peak_held=tuple(map(peak_held, orders, kept)),
        timed_actions=tuple(map(tuple, timed_actions)),
    )


def _by_micro_batch(name: str, values: Times, counts: Sequence[bool], micro_batches: int) -> list[float]:
    """Seconds of every micro-batch of each stage or boundary that counts, 0 of the others, in one list."""
    spread: list[float] = []
    for seconds, counted in zip(_values_or_zeros(name, values, len(counts)), counts, strict=True):
        each = [seconds] * micro_batches if isinstance(seconds, (int, float)) else list(seconds)
        if len(each) != micro_batches:
            raise ResourceModelError(f"{name} has {len(each)} micro-batches, this step has {micro_batches}")
        spread += each if counted else [0.0] * micro_batches
    return spread


def _values_or_zeros(name: str, values: Sequence[T], length: int) -> Sequence[T | float]:
    """The values, or zeros where none are given."""
    if len(values) not in (0, length):
        raise ResourceModelError(f"{name} has {len(values)} values, this pipeline needs {length}")
    return values or [0.0] * length
