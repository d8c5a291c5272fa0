"""Run the micro-batches of one step through this rank's stage: 1F1B over several stages, a plain loop on one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.distributed.pipelining import Schedule1F1B

from piper_hpc.model import Stage
from piper_hpc.parallel.groups import Groups
from piper_hpc.parallel.messages import InstrumentedStage, instrumented_schedule
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Workload
from piper_hpc.spec.layout import Layout
from piper_hpc.spec.model import ModelSpec


class TokenLoss:
    """Cross-entropy summed over a micro-batch's tokens, over the tokens of the whole step on all ranks.

    loss = sum over the micro-batch's tokens of -log p(target) / global_tokens, in nats. So gradients are summed over
    micro-batches and over ranks, and never averaged. `total`, a float64 scalar, adds up the losses since `reset`: this
    rank's share of the step's loss. global_tokens: targets of the step on all ranks.
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
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / self._global_tokens
        self.total += loss.detach()
        return loss

    def reset(self) -> None:
        """Begin a new step's sum."""
        self.total.zero_()


class Pipeline:
    """One rank's part in the forward and backward of a step. Gradients add up in the stage's parameters.

    The number of micro-batches and the shape of one are fixed: torch's stages are given static metadata, because
    their own inference would run an extra forward and backward on the first step.
    """

    def __init__(
        self,
        stage: Stage,
        *,
        model: ModelSpec,
        layout: Layout,
        workload: Workload,
        groups: Groups,
        recorder: Recorder,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.loss = TokenLoss(workload.tokens, recorder, device)
        self._stage = stage
        self._recorder = recorder
        self._micro_batch = layout.micro_batch
        self._is_first = 0 in groups.place.stages
        self._is_last = layout.stages - 1 in groups.place.stages
        self._schedule: Schedule1F1B | None = None
        if layout.pp > 1:
            shape = (layout.micro_batch, workload.sequence)
            watched_stage = static_stage(stage, model, shape, groups, layout.pp, device, dtype)
            watched_stage.recorder = recorder
            self._schedule = Schedule1F1B(
                watched_stage, layout.micro_batches(workload.global_batch), loss_fn=self.loss, scale_grads=False
            )

    def step(self, tokens: torch.Tensor) -> None:
        """Forward and backward of all micro-batches of tokens int64 [sequences of this rank, sequence + 1]."""
        self.loss.reset()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
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
                loss = self.loss(self._stage(micro_inputs), micro_targets)
            with self._recorder.backward_pass():
                loss.backward()


def static_stage(
    stage: Stage,
    model: ModelSpec,
    shape: tuple[int, int],
    groups: Groups,
    stages: int,
    device: torch.device,
    dtype: torch.dtype,
) -> InstrumentedStage:
    """The torch stage of this rank with its input and output metadata; shape: [batch, sequence] of a micro-batch."""
    (index,) = groups.place.stages
    hidden = torch.empty(*shape, model.hidden, dtype=dtype, device="meta", requires_grad=True)
    logits = torch.empty(*shape, model.vocab, dtype=dtype, device="meta", requires_grad=True)
    tokens = torch.empty(shape, dtype=torch.int64, device="meta")
    return InstrumentedStage(
        stage,
        index,
        stages,
        device,
        input_args=tokens if index == 0 else hidden,
        output_args=logits if index == stages - 1 else hidden,
        group=groups.pipeline,
    )
