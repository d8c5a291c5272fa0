"""Run the micro-batches of one step through this rank's chunks of layers, in the order of the layout's schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch.distributed.pipelining import schedules

from piper_hpc.model import Stage
from piper_hpc.parallel.groups import Groups
from piper_hpc.parallel.messages import InstrumentedStage, instrumented_schedule
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Workload
from piper_hpc.spec.layout import Layout
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.orders import Action, rank_order
from piper_hpc.spec.schedules import stage_of

UNLEARNT = -1
"""A target that adds nothing to the loss."""


class TokenLoss:
    """Cross-entropy summed over a micro-batch's tokens, over the tokens of the whole step on all ranks.

    loss = sum over the micro-batch's tokens of -log p(target) / global_tokens, in nats, where a target below 0 adds 0
    and counts as a token. So gradients are summed over micro-batches and over ranks, and never averaged. `total`, a
    float64 scalar, adds up the losses since `reset`: this rank's share of the step's loss. global_tokens: targets of
    the step on all ranks.
    """

    def __init__(self, global_tokens: int, recorder: Recorder, device: torch.device) -> None:
        self._global_tokens = global_tokens
        self._recorder = recorder
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """logits [batch, sequence, vocab], targets int64 [batch, sequence] -> scalar."""
        return self._recorder.timed("head", lambda given: self._loss(given, targets), logits)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=UNLEARNT)
        loss = loss / self._global_tokens
        self.total += loss.detach()
        return loss

    def reset(self) -> None:
        """Begin a new step's sum."""
        self.total.zero_()


class Pipeline:
    """One rank's part in the forward and backward of a step. Gradients add up in the parameters of its chunks.

    Over several pipeline ranks torch's runtime carries out the order that `spec.orders` gives, the one that predictions
    simulate; on one rank chunks follow one another, whatever the schedule. on_gradients is called with the index of a
    chunk when the last gradient of its parameters is there.

    The number of micro-batches and the shape of one are fixed: torch's stages are given static metadata, because their
    own inference would run an extra forward and backward on the first step.
    """

    def __init__(
        self,
        chunks: Sequence[Stage],
        *,
        model: ModelSpec,
        layout: Layout,
        workload: Workload,
        groups: Groups,
        recorder: Recorder,
        device: torch.device,
        dtype: torch.dtype,
        on_gradients: Callable[[int], None],
    ) -> None:
        self.loss = TokenLoss(workload.tokens, recorder, device)
        self._chunks = chunks
        self._recorder = recorder
        self._micro_batch = layout.micro_batch
        self._on_gradients = on_gradients
        self._is_first = 0 in groups.place.stages
        self._is_last = layout.stages - 1 in groups.place.stages
        self._schedule: schedules._PipelineScheduleRuntime | None = None
        if layout.pp > 1:
            shape = (layout.micro_batch, workload.sequence)
            stages = [
                static_stage(chunk, index, model, shape, groups, layout.stages, device, dtype)
                for chunk, index in zip(chunks, groups.place.stages, strict=True)
            ]
            for chunk_index, stage in enumerate(stages):
                stage.recorder = recorder
                stage.on_gradients = partial(on_gradients, chunk_index)
            self._schedule = ordered_schedule(stages, layout, layout.micro_batches(workload.global_batch), self.loss)

    def step(self, tokens: torch.Tensor) -> None:
        """Forward and backward of all micro-batches of tokens int64 [sequences of this rank, sequence + 1].

        A token t below 0 is -1 - t as an input, and no target.
        """
        self.loss.reset()
        inputs, targets = torch.where(tokens < 0, -1 - tokens, tokens)[:, :-1], tokens[:, 1:].clamp(min=UNLEARNT)
        if self._schedule is None:
            self._accumulate(inputs, targets)
            return
        with instrumented_schedule(self._recorder):
            self._schedule.step(
                *((inputs,) if self._is_first else ()),
                target=targets if self._is_last else None,
                return_outputs=False,
            )

    def _accumulate(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        micro_batches = zip(inputs.split(self._micro_batch), targets.split(self._micro_batch), strict=True)
        for micro_inputs, micro_targets in micro_batches:
            with self._recorder.region("other"):
                # No name may keep the logits, which the loss needs no longer, through the backward.
                loss = self.loss(reduce(lambda hidden, chunk: chunk(hidden), self._chunks, micro_inputs), micro_targets)
            with self._recorder.backward_pass():
                loss.backward()
        for index in range(len(self._chunks)):
            self._on_gradients(index)


def ordered_schedule(
    stages: Sequence[InstrumentedStage], layout: Layout, micro_batches: int, loss: TokenLoss
) -> schedules._PipelineScheduleRuntime:
    """torch's pipeline runtime over this rank's stages, with the order of every rank that `spec.orders` gives.

    torch adds sends and receives to the orders, each receive where its sender has sent: no rank waits for a message
    that waits for it. Raises RuntimeError with a torch that has no such runtime.
    """
    if not hasattr(schedules, "_PipelineScheduleRuntime"):
        raise RuntimeError(
            f"torch {torch.__version__} has no torch.distributed.pipelining.schedules._PipelineScheduleRuntime: "
            "orders of a pipeline cannot be carried out; torch 2.13 can"
        )
    runtime = schedules._PipelineScheduleRuntime(list(stages), micro_batches, loss_fn=loss, scale_grads=False)
    orders: dict[int, list[schedules._Action | None]] = {
        rank: [
            _torch_action(action, [stage_of(layout.schedule, rank, chunk, layout.pp) for chunk in range(layout.vpp)])
            for action in rank_order(layout.schedule, rank, layout.pp, layout.vpp, micro_batches)
        ]
        for rank in range(layout.pp)
    }
    runtime._prepare_schedule_with_comms(orders)
    return runtime


KINDS = {
    "F": schedules.FORWARD,
    "B": schedules.FULL_BACKWARD,
    "I": schedules.BACKWARD_INPUT,
    "W": schedules.BACKWARD_WEIGHT,
}
"""torch's word for each kind of `spec.orders.Action`."""


def _torch_action(action: Action, stages: Sequence[int]) -> schedules._Action:
    """`action` as torch has it; stages: the global stage of each chunk of the rank."""
    if action.backward is None:
        return schedules._Action(stages[action.chunk], KINDS[action.kind], action.micro_batch)
    parts = tuple(_torch_action(part, stages) for part in action.parts)
    return schedules._Action(stages[action.chunk], schedules.OVERLAP_F_B, action.micro_batch, parts)


def static_stage(
    chunk: Stage,
    index: int,
    model: ModelSpec,
    shape: tuple[int, int],
    groups: Groups,
    stages: int,
    device: torch.device,
    dtype: torch.dtype,
) -> InstrumentedStage:
    """torch's stage `index` of `stages` with static metadata; shape: [batch, sequence] of a micro-batch."""
    hidden = torch.empty(*shape, model.hidden, dtype=dtype, device="meta", requires_grad=True)
    logits = torch.empty(*shape, model.vocab, dtype=dtype, device="meta", requires_grad=True)
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    return InstrumentedStage(
        chunk,
        index,
        stages,
        device,
        input_args=tokens if index == 0 else hidden,
        output_args=logits if index == stages - 1 else hidden,
        group=groups.pipeline,
    )
