"""Pipeline p2p messages: when a sender posted each one, how long its receiver waited, and when what was sent is freed.

torch's pipeline runtime posts and waits through two module functions; while a step runs they are replaced by ones that
mark the time around them, and that wait for all but the last few sends, for which torch waits at the end of the step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, schedules

from piper_hpc.profiling.spans import BACKWARD, FORWARD, Message, Pass, Recorder
from piper_hpc.spec.executor import SENDS_UNDER_WAY


class WorkBatch(list[dist.Work]):
    """What torch returns for one batch of p2p operations (their Work handles), and the message received, if any."""

    received: Message | None = None


def tag_operations(operations: list[dist.P2POp], message: Message) -> list[dist.P2POp]:
    """Set `message` on each operation. Returns the same list."""
    for operation in operations:
        operation.message = message  # type: ignore[attr-defined]
    return operations


class InstrumentedStage(PipelineStage):
    """A pipeline stage whose messages are tagged and whose calls into the module and autograd are regions.

    on_gradients is called when the last gradient of the stage's parameters is there.
    """

    recorder: Recorder
    on_gradients: Callable[[], None]

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return tag_operations(super().get_fwd_recv_ops(fwd_chunk_id), Message(FORWARD, self.stage_index, fwd_chunk_id))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        message = Message(FORWARD, self.stage_index + 1, fwd_chunk_id)
        return tag_operations(super().get_fwd_send_ops(fwd_chunk_id), message)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return tag_operations(super().get_bwd_recv_ops(bwd_chunk_id), Message(BACKWARD, self.stage_index, bwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        message = Message(BACKWARD, self.stage_index - 1, bwd_chunk_id)
        return tag_operations(super().get_bwd_send_ops(bwd_chunk_id), message)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.recorder.region("other", Pass("F", self.stage_index, fwd_chunk_id)):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: torch.Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        action = Pass("B" if full_backward else "I", self.stage_index, bwd_chunk_id)
        with self.recorder.backward_pass("other", action):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        # A pass for weight gradients alone goes through no region of the modules. Stage 0 has no input gradient: its
        # whole backward comes as one, where the weight gradients belong, and is timed by module.
        name = "weight_grad" if self.stage_index else "other"
        with self.recorder.backward_pass(name, Pass("W", self.stage_index, bwd_chunk_id)):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        self.on_gradients()


@contextmanager
def instrumented_schedule(recorder: Recorder) -> Iterator[None]:
    """Within, every post and every wait of a torch pipeline schedule in this process is marked on `recorder`.

    A handle of a send keeps its tensor alive: a rank that has SENDS_UNDER_WAY younger ones waits for the oldest. That
    blocks nobody for ever, as torch has placed each receive where, in one order of all ranks' actions, its send is.

    Raises RuntimeError with a torch whose schedules do not post through these functions.
    """
    names = ("_batch_p2p", "_wait_batch_p2p")
    if not all(hasattr(schedules, name) for name in names):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.distributed.pipelining.schedules.{names[0]}: "
            "messages between stages cannot be timed; torch 2.13 can"
        )
    post, wait = (getattr(schedules, name) for name in names)
    under_way: deque[WorkBatch] = deque()

    def marked_post(operations: list[dist.P2POp], desc: str | None = None) -> WorkBatch:
        for operation in operations:
            if operation.op is dist.isend:
                recorder.post(operation.message)  # type: ignore[attr-defined]
        works = WorkBatch(post(operations, desc))
        received = [operation.message for operation in operations if operation.op is dist.irecv]  # type: ignore[attr-defined]
        works.received = received[0] if received else None
        if works and not received:
            under_way.append(works)
            if len(under_way) > SENDS_UNDER_WAY:
                oldest = under_way.popleft()
                marked_wait(oldest)
                oldest.clear()
        return works

    def marked_wait(works: list[dist.Work]) -> None:
        if works:
            with recorder.waiting(getattr(works, "received", None)):
                wait(works)

    setattr(schedules, names[0], marked_post)
    setattr(schedules, names[1], marked_wait)
    try:
        yield
    finally:
        setattr(schedules, names[0], post)
        setattr(schedules, names[1], wait)
