"""Order of actions on every rank: GPipe, 1F1B, interleaved 1F1B, ZB-H1, ZBV and DualPipeV.

One order for both: the resource model simulates it, and the executor hands it to torch's pipeline runtime. A rank
holds `vpp` chunks of the model; chunk c of rank r is global stage `stage_of(...)`. Sources: GPipe arXiv 1811.06965;
1F1B and interleaved arXiv 2104.04473 (Megatron's order); ZB-H1 and ZBV arXiv 2401.10241; DualPipeV is DualPipe (arXiv
2412.19437) cut in half. torch.distributed.pipelining's own orders are the same where it has them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from typing import NamedTuple

from piper_hpc.spec.schedules import schedule_problem


class Action(NamedTuple):
    """One piece of work on one micro-batch of one chunk.

    kind: F forward, B whole backward, I input gradient, W weight gradient, FB a forward (of this micro-batch and
    chunk) overlapped with the whole backward that `backward` names.
    """

    kind: str
    micro_batch: int
    chunk: int = 0
    backward: Action | None = None

    @property
    def parts(self) -> tuple[Action, ...]:
        """The action itself, or the forward and the backward that it overlaps."""
        return (self,) if self.backward is None else (Action("F", self.micro_batch, self.chunk), self.backward)


def rank_order(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """The actions of `rank` in order; ValueError where `schedule_problem` has one."""
    broken = schedule_problem(schedule, pp, vpp, micro_batches)
    if broken is not None:
        raise ValueError(broken)
    return _ORDERS[schedule](rank, pp, vpp, micro_batches)


def _gpipe(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    return [Action(kind, index) for kind in "FB" for index in range(micro_batches)]


def _1f1b(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """PP - 1 - r forwards to warm up, then one forward and one backward in turn."""
    forwards = [Action("F", index) for index in range(micro_batches)]
    backwards = [Action("B", index) for index in range(micro_batches)]
    return _in_turn(forwards, backwards, warm_up=pp - 1 - rank)


def _interleaved(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """PP micro-batches through chunk 0, the same through chunk 1, ..., then the next PP; backwards from the last."""
    micro_batches_and_chunks = [
        (first + index, chunk) for first in range(0, micro_batches, pp) for chunk in range(vpp) for index in range(pp)
    ]
    forwards = [Action("F", index, chunk) for index, chunk in micro_batches_and_chunks]
    backwards = [Action("B", index, vpp - 1 - chunk) for index, chunk in micro_batches_and_chunks]
    return _in_turn(forwards, backwards, warm_up=2 * (pp - 1 - rank) + (vpp - 1) * pp)


def _zb_h1(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """1F1B on input gradients; the weight gradient comes r micro-batches later, so every rank holds up to PP."""
    order = []
    for action in _1f1b(rank, pp, vpp, micro_batches):
        if action.kind == "F":
            order.append(action)
            continue
        order.append(Action("I", action.micro_batch))
        if action.micro_batch >= rank:
            order.append(Action("W", action.micro_batch - rank))
    late = range(max(0, micro_batches - rank), micro_batches)
    return order + [Action("W", index) for index in late]


def _in_turn(forwards: list[Action], backwards: list[Action], warm_up: int) -> list[Action]:
    """`warm_up` forwards, then forward and backward in turn, then the backwards that are left."""
    order = forwards[:warm_up]
    for index, backward in enumerate(backwards):
        order += forwards[warm_up + index : warm_up + index + 1]
        order.append(backward)
    return order


class _OrderBuilder:
    """Builds the order of one rank; it counts, by kind and chunk, which micro-batch comes next."""

    def __init__(self) -> None:
        self.order: list[Action] = []
        self.pending_weight_grads: deque[tuple[int, int]] = deque()
        self._next: defaultdict[tuple[str, int], int] = defaultdict(int)

    def write(self, *steps: str) -> None:
        """Steps such as "F0" or "I1": the next micro-batch of this kind on this chunk."""
        self.order += [self._take(step) for step in steps]

    def pair(self, forward: str, backward: str) -> None:
        """A forward and a whole backward at the same time."""
        first = self._take(forward)
        self.order.append(Action("FB", first.micro_batch, first.chunk, self._take(backward)))

    def oldest_weight_grad(self) -> None:
        """The weight gradient that has waited longest."""
        index, chunk = self.pending_weight_grads.popleft()
        self.order.append(Action("W", index, chunk))

    def count(self, step: str) -> int:
        """Micro-batches so far of this kind on this chunk."""
        return self._next[step[0], int(step[1])]

    def _take(self, step: str) -> Action:
        kind, chunk = step[0], int(step[1])
        counter = ("I" if kind == "B" else kind, chunk)
        index = self._next[counter]
        self._next[counter] += 1
        if kind == "I":
            self.pending_weight_grads.append((index, chunk))
        return Action(kind, index, chunk)


def _zbv(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """Written for at least 2 PP - 1 micro-batches; those that do not exist are left out again."""
    total = max(2 * pp - 1, micro_batches)
    builder = _OrderBuilder()
    builder.write(*["F0"] * (2 * (pp - rank) - 1))
    builder.write(*["F1", "F0"] * rank)
    builder.write(*["F1", "I1", "W1"] * (pp - rank))
    while builder.count("F1") < total:
        if builder.count("F0") < total:
            builder.write("F0")
        builder.write("I0", "W0", "F1", "I1", "W1")
    builder.write(*["I0", "I1"] * rank)
    builder.write(*["I0", "W0"] * (pp - rank))
    for chunk in ("1", "0"):
        builder.write(*["W" + chunk] * (total - builder.count("W" + chunk)))
    return [action for action in builder.order if action.micro_batch < micro_batches]


def _dualpipev(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """The eight phases of DeepSeek's DualPipeV; in phase 6 the second half of the backwards is split."""
    below = pp - rank - 1
    builder = _OrderBuilder()
    builder.write(*["F0"] * (2 * below))
    builder.write(*["F0", "F1"] * (rank + 1))
    for _ in range(below):
        builder.write("I1")
        builder.oldest_weight_grad()
        builder.write("F1")
    for index in range(micro_batches - 2 * pp + rank + 1):
        if index == 0 and below == 0:
            builder.write("F0", "B1")  # the turn starts its first backward without an overlap, so that it ends sooner
        else:
            builder.pair("F0", "B1")
        builder.pair("F1", "B0")
    for _ in range(below):
        builder.write("B1")
        builder.pair("F1", "B0")
    for index in range(2 * (rank + 1)):
        builder.write(("I" if index > rank else "B") + str(1 - index % 2))
    for _ in range(below):
        builder.oldest_weight_grad()
        builder.write("I0")
    while builder.pending_weight_grads:
        builder.oldest_weight_grad()
    return builder.order


_ORDERS: dict[str, Callable[[int, int, int, int], list[Action]]] = {
    "gpipe": _gpipe,
    "1f1b": _1f1b,
    "interleaved": _interleaved,
    "zb_h1": _zb_h1,
    "zbv": _zbv,
    "dualpipev": _dualpipev,
}
