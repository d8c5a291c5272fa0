"""Regions of a training step, timed where they happen: forward on entry and exit, backward by hooks of autograd.

Every region belongs to one term. Regions nest, and a term gets only the time that no inner region claims, so that no
second counts twice. What no region claims is `other_s`, which piper_hpc.train.metrics computes as the step's length
less all other terms: they add up to it exactly, and none but `other_s` is such a remainder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch

from piper_hpc.profiling.clock import Clock, Mark

WAIT = "wait"
"""Name of the regions that wait for another rank; `Message` says for what."""

POST = "post"
"""Name of the spans without length at which a rank posts a message."""

FORWARD, BACKWARD, ALL_RANKS = 0, 1, 2
"""What a message carries: activations, gradients, or a rank's arrival at a collective of the whole job."""

Result = TypeVar("Result")
Seconds = float | np.ndarray


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank posts and another waits for: `kind` is FORWARD, BACKWARD or ALL_RANKS.

    stage: the global pipeline stage that receives it, 0 where all ranks do.
    """

    kind: int
    stage: int = 0
    micro_batch: int = 0


@dataclass(frozen=True, slots=True)
class Pass:
    """One action of a pipeline rank: `kind` F, B, I or W as in spec.orders, of one micro-batch through one stage."""

    kind: str
    stage: int
    micro_batch: int


About = Message | Pass | None


@dataclass(frozen=True, slots=True)
class Span:
    """One region: its term, its start and end on the host's monotonic clock, the message or pass that it is about."""

    name: str
    start_s: float
    end_s: float
    backward: bool = False
    message: Message | None = None
    action: Pass | None = None


class Region:
    """Context manager of one region in forward order."""

    __slots__ = ("_about", "_name", "_recorder", "_start")

    def __init__(self, recorder: Recorder, name: str, about: About = None) -> None:
        self._recorder, self._name, self._about = recorder, name, about

    def __enter__(self) -> None:
        self._start = self._recorder.clock.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        recorder.raw.append((self._name, False, self._start, recorder.clock.now(), self._about))


class BackwardRegion:
    """The backward of one timed call: opens with the first gradient of an output, closes where the next one opens."""

    __slots__ = ("_name", "_opened", "_recorder")

    def __init__(self, recorder: Recorder, name: str) -> None:
        self._recorder, self._name, self._opened = recorder, name, False

    def open(self, gradients: tuple[torch.Tensor | None, ...]) -> None:
        """Before the node of an output."""
        if not self._opened:
            self._opened = True
            self._recorder.mark_backward(self._name)


class Recorder:
    """Collects the regions of one step on one rank. Marks are cheap; `finish` resolves them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.raw: list[tuple[str, bool, Mark, Mark, About]] = []
        self.backward: list[tuple[str | None, Mark]] = []
        """Of the pass of autograd that runs: which region opens when; None closes the one before and opens none."""
        self._posts: dict[Message, Mark] = {}

    def start(self) -> None:
        """Begin a step: forget the one before."""
        self.raw.clear()
        self.backward.clear()
        self._posts.clear()
        self.clock.start()

    def region(self, name: str, action: Pass | None = None) -> AbstractContextManager[None]:
        """`with recorder.region("optimizer"): ...`; action: the pass of the pipeline that it is."""
        return Region(self, name, action)

    def waiting(self, message: Message | None) -> AbstractContextManager[None]:
        """A wait for `message`, or only for own sends to leave (None)."""
        return Region(self, WAIT, message)

    def post(self, message: Message) -> None:
        """This rank posts `message` now; its receiver's wait is judged by this moment."""
        now = self.clock.now()
        self._posts[message] = now
        self.raw.append((POST, False, now, now, message))

    def timed(self, name: str, function: Callable[..., Result], *inputs: torch.Tensor) -> Result:
        """Return `function(*inputs)`; its forward and the backward of it count as `name`.

        Autograd runs nodes in the reverse of their creation, so that regions which follow one another in forward do so
        in backward: each closes where the one before it in forward opens, and hooks of its outputs' nodes are enough.
        An input that no node made (what a stage received) has none before it: a view of it closes the region.
        """
        given = [self._closing(tensor) for tensor in inputs]
        with self.region(name):
            result = function(*given)
        backward = BackwardRegion(self, name)
        for output in result if isinstance(result, tuple) else (result,):
            if isinstance(output, torch.Tensor) and output.grad_fn is not None:
                output.grad_fn.register_prehook(backward.open)
        return result

    def mark_backward(self, name: str | None) -> None:
        """In the backward the region `name` opens now, and the one before closes; None: that one only closes."""
        self.backward.append((name, self.clock.now()))

    def _closing(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.grad_fn is not None or not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        view = tensor.view_as(tensor)
        assert view.grad_fn is not None
        view.grad_fn.register_prehook(lambda gradients: self.mark_backward(None))
        return view

    def backward_pass(self, name: str = "other", action: Pass | None = None) -> AbstractContextManager[None]:
        """Around one call of autograd: closes the last region, where no input does (the embedding's need no gradient).

        What no region claims counts as `name`.
        """
        return BackwardPass(self, name, action)

    def finish(self) -> list[Span]:
        """End the step; its spans in order of their start."""
        self.clock.finish()
        seconds = self.clock.seconds
        spans = [
            Span(
                name,
                seconds(start),
                seconds(end),
                backward,
                about if isinstance(about, Message) else None,
                about if isinstance(about, Pass) else None,
            )
            for name, backward, start, end, about in self.raw
        ]
        return sorted(spans, key=lambda span: (span.start_s, -span.end_s))

    def posts(self) -> dict[Message, float]:
        """When this rank posted its messages; valid after `finish`."""
        return {message: self.clock.seconds(mark) for message, mark in self._posts.items()}


class BackwardPass:
    """Context manager: collects the backward regions that ran inside one call of autograd."""

    def __init__(self, recorder: Recorder, name: str, action: Pass | None) -> None:
        self._recorder, self._name, self._action = recorder, name, action

    def __enter__(self) -> None:
        self._start = self._recorder.clock.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        recorder = self._recorder
        end = recorder.clock.now()
        recorder.raw.append((self._name, True, self._start, end, self._action))
        recorder.raw.extend(
            (name, True, opens, closes, None)
            for (name, opens), (_, closes) in pairwise([*recorder.backward, (None, end)])
            if name is not None
        )
        recorder.backward.clear()


def self_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """Self time (exclusive time) in seconds by name: each span less the spans inside it.

    Spans nest and come sorted as `Recorder.finish` returns them.
    """
    totals: dict[str, float] = {}
    enclosing: list[Span] = []
    for span in spans:
        while enclosing and enclosing[-1].end_s <= span.start_s:
            enclosing.pop()
        length = span.end_s - span.start_s
        totals[span.name] = totals.get(span.name, 0.0) + length
        if enclosing:
            totals[enclosing[-1].name] -= length
        enclosing.append(span)
    return totals


def split_wait_s(start_s: Seconds, end_s: Seconds, posted_s: Seconds) -> tuple[Any, Any]:
    """Split waits into (before the sender had posted, transfer after it had), both in seconds, adding up to them.

    Numbers, or arrays that broadcast.
    """
    before = np.clip(posted_s, start_s, end_s) - start_s
    return before, end_s - start_s - before
