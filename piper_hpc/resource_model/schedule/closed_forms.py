"""Seconds, bubbles and in-flight micro-batches of the schedules as formulas, for one layout or a grid of them.

Every number but `pp` and `vpp` may be a NumPy array. With equal ranks, equal chunks and free messages the seconds equal
the simulated ones for any F, I, W and M that the schedule allows, except zbv with PP < M < 2 PP - 1, where they are
interpolated between both ends. A step is the longest path through its actions; each entry of a `_longest` is one path.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec.schedules import SCHEDULES


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch on a whole rank (all its chunks): forward, input gradient, weight gradient.

    Schedules that do not split the backward use input_s + weight_s alone.
    """

    forward_s: Number
    input_s: Number
    weight_s: Number = 0.0

    @property
    def total_s(self) -> Number:
        """Forward and whole backward."""
        return self.forward_s + self.input_s + self.weight_s

    def __mul__(self, times: Number) -> Work:
        return Work(self.forward_s * times, self.input_s * times, self.weight_s * times)


def step_s(
    schedule: str,
    pp: int,
    vpp: int,
    micro_batches: Number,
    busiest: Work,
    others: Work | None = None,
    overlap_s: Number = 0.0,
) -> Number:
    """Seconds of a step with free messages: the busiest rank's work, its bubble, less what dualpipev's pairs save.

    busiest: of the busiest rank; others: the sum over the other PP - 1 ranks, (PP - 1) * busiest unless given. Exact
    for equal ranks; otherwise an estimate in which the other ranks fill and drain the pipeline at their own pace.
    overlap_s: what one overlapped pair saves; the longest path of dualpipev passes 2 M - PP - 2 of them.
    """
    work = micro_batches * busiest.total_s + bubble_s(schedule, pp, vpp, busiest, others, micro_batches)
    if schedule == "dualpipev":
        work = work - (2 * micro_batches - pp - 2) * overlap_s
    return work


def bubble_s(
    schedule: str, pp: int, vpp: int, busiest: Work, others: Work | None = None, micro_batches: Number = np.inf
) -> Number:
    """Idle seconds of the busiest rank in a step, start and end included; arguments as for `step_s`.

    micro_batches matters to zb_h1 below PP of them and to zbv below 2 PP - 1; more than that unless given. With
    P = PP - 1 and F, I, W, B = I + W of a whole rank: gpipe, 1f1b P (F + B); interleaved P (F + B) / v (arXiv
    2104.04473); zb_h1 P (F + I - W) where W <= F and W <= I (arXiv 2401.10241). Where F = I = W: zbv P F / 2, which is
    the wait for the first message (the paper does not count it and says zero), and dualpipev P F, which is DeepSeek's
    P (F&B + B - 3 W) of half ranks. The other paths matter where F, I and W differ.
    """
    _check(schedule)
    rest = busiest * (pp - 1) if others is None else others
    if schedule in ("gpipe", "1f1b", "interleaved"):
        return rest.total_s / vpp
    if pp == 1:
        return 0.0 * busiest.forward_s
    f, i, w = busiest.forward_s, busiest.input_s, busiest.weight_s
    rest_f, rest_i, rest_w = rest.forward_s, rest.input_s, rest.weight_s
    if schedule == "zb_h1":
        lacking = np.maximum(pp - micro_batches, 0)
        return _longest(rest_f + lacking * i, rest_i + lacking * f, rest_f + rest_i - rest_w + lacking * w)
    if schedule == "dualpipev":
        halves = _longest(
            2 * rest_f, 2 * rest_f + rest_i - rest_w, rest_f - f + rest_i, rest_f - f + 2 * rest_i - rest_w
        )
        return halves / 2
    many = _longest(
        rest_i,
        2 * (rest_i - rest_w),
        2 * rest_f - rest_i - w,
        2 * rest_f - rest_i - f + i,
        2 * (rest_f - rest_w) - w,
        2 * (rest_f - rest_w) - f + i,
        rest_w + f - w,
        rest_w + i - w,
    )
    m = np.minimum(micro_batches, pp)
    few = _longest(
        2 * rest_i + 2 * (pp - m) * f,
        2 * rest_f + 2 * (pp - m) * i + 2 * (1 - m) * w,
        rest_f + rest_i + (pp - m) * (f + i),
        2 * rest_f + (2 * pp + 1 - 3 * m) * i + (1 - m) * w,
    )
    share = np.clip((micro_batches - pp) / (pp - 1), 0.0, 1.0)
    return (few + share * (many - few)) / 2


def bubble_fraction(schedule: str, pp: int, vpp: int, micro_batches: Number, work: Work) -> Number:
    """Idle share of a step with equal ranks and free messages, 0 ... 1; 1f1b: (PP - 1) / (M + PP - 1)."""
    idle = bubble_s(schedule, pp, vpp, work, micro_batches=micro_batches)
    return idle / (micro_batches * work.total_s + idle)


def exposed_messages(schedule: str, pp: int, vpp: int, micro_batches: Number, *, blocking: bool = True) -> Number:
    """How many times the seconds of one message a step grows by, for messages short against the work of a chunk.

    Exact for gpipe, 1f1b and interleaved with equal ranks and micro_batches a multiple of pp; for the others exact up
    to about PP messages near F = I = W. With messages of half a chunk's forward a step comes out at most 5 % too short
    (blocking interleaved, non-blocking dualpipev; the others 2 %). blocking as in `simulate`. Non-blocking 1f1b waits
    too: neighbours that take turns have a round trip in every cycle of PP micro-batches; interleaved hides it.
    """
    _check(schedule)
    below = pp - 1
    if below == 0:
        return 0 * micro_batches
    count: dict[str, Number]
    if blocking:
        turns = micro_batches + 1 if pp == 2 else 2 * micro_batches + 2 * pp - 5
        count = {
            "gpipe": 2 * (micro_batches + pp - 2),
            "1f1b": turns,
            "interleaved": (2 * vpp - 1) * micro_batches + 2 * pp - 3,
            "zb_h1": turns,
            "zbv": 2 * micro_batches if pp == 2 else 4 * micro_batches + pp - 5,
            "dualpipev": micro_batches + 4 if pp == 2 else 2 * micro_batches + 3 * pp - 6,
        }
    else:
        turns = 2 * below * (micro_batches / pp) + 2 * (pp - 2)
        count = {
            "gpipe": 2 * below + 0 * micro_batches,
            "1f1b": turns,
            "interleaved": 2 * (pp * vpp - 1) + 0 * micro_batches,
            "zb_h1": 4 * below + 0 * micro_batches,
            "zbv": 5 * below - 2 + 0 * micro_batches,
            "dualpipev": turns,
        }
    return count[schedule]


def in_flight(schedule: str, rank: Number, pp: int, vpp: int, micro_batches: Number) -> Number:
    """The most chunk activations that `rank` holds at once (a chunk is 1 / vpp of the rank's layers).

    By rank r: gpipe M; 1f1b PP - r (Eq 4 of arXiv 2605.05049); interleaved (v - 1) PP + 2 (PP - 1 - r) + 1; zb_h1 PP;
    zbv 2 PP; dualpipev 2 PP + 1, which is PP + 1/2 whole ranks; never more than there are.
    """
    return sum(in_flight_by_chunk(schedule, rank, pp, vpp, micro_batches))


def in_flight_by_chunk(schedule: str, rank: Number, pp: int, vpp: int, micro_batches: Number) -> tuple[Number, ...]:
    """The same by chunk, when the rank first holds the most; where chunks differ, `peak_held` is exact."""
    _check(schedule)
    if schedule == "gpipe":
        return (micro_batches + 0 * rank,)
    if schedule == "1f1b":
        return (np.minimum(pp - rank, micro_batches),)
    if schedule == "zb_h1":
        return (np.minimum(pp, micro_batches) + 0 * rank,)
    if schedule == "interleaved":
        forwards = np.minimum((vpp - 1) * pp + 2 * (pp - 1 - rank) + 1, vpp * micro_batches)
        rounds, begun = forwards // (vpp * pp), forwards % (vpp * pp)
        return tuple(rounds * pp + np.clip(begun - chunk * pp, 0, pp) for chunk in range(vpp))
    if schedule == "zbv":
        both = np.minimum(np.minimum(2 * pp, 2 * micro_batches), micro_batches + 1 + rank)
        down = np.minimum(2 * pp - 1 - rank, micro_batches)
        return down, both - down
    return 2 * pp - rank + 0 * micro_batches, rank + 1 + 0 * micro_batches


def _check(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ResourceModelError(f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}")


def _longest(*paths: Number) -> Number:
    return reduce(np.maximum, paths)
