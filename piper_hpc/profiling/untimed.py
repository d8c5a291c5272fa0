"""The recorder of training that is not timed: the length of a step, and nothing inside it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

from piper_hpc.profiling.clock import Mark
from piper_hpc.profiling.spans import Message, Pass, Recorder, Span

Result = TypeVar("Result")
_NOTHING = nullcontext()


class UntimedRecorder(Recorder):
    """Two marks a step, and no spans inside it, no hooks on tensors and no posts."""

    _started: Mark

    def start(self) -> None:
        """See `Recorder.start`."""
        super().start()
        self._started = self.clock.now()

    def region(self, name: str, action: Pass | None = None) -> AbstractContextManager[None]:
        """Nothing is marked."""
        return _NOTHING

    def waiting(self, message: Message | None) -> AbstractContextManager[None]:
        """Nothing is marked."""
        return _NOTHING

    def post(self, message: Message) -> None:
        """Nothing is marked."""

    def timed(self, name: str, function: Callable[..., Result], *inputs: torch.Tensor) -> Result:
        """`function(*inputs)`, on the tensors themselves."""
        return function(*inputs)

    def backward_pass(self, name: str = "other", action: Pass | None = None) -> AbstractContextManager[None]:
        """Nothing is marked."""
        return _NOTHING

    def finish(self) -> list[Span]:
        """End the step: the one span that encloses it."""
        ended = self.clock.now()
        self.clock.finish()
        return [Span("other", self.clock.seconds(self._started), self.clock.seconds(ended))]
