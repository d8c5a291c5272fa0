"""The training loop: `Trainer` does one optimizer step on this rank, `train` repeats it and writes checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.model import Stage
from piper_hpc.model.names import initialise
from piper_hpc.parallel.dispatcher import AllToAllConfigs, make_dispatcher
from piper_hpc.parallel.gradients import Gradients
from piper_hpc.parallel.groups import make_groups
from piper_hpc.parallel.pipeline import Pipeline
from piper_hpc.profiling.clock import clock_for, compare_with_rank_0
from piper_hpc.profiling.memory import peak_tensor_bytes, rss_bytes
from piper_hpc.profiling.offset import ClockOffset
from piper_hpc.profiling.spans import ALL_RANKS, Message, Recorder, Span
from piper_hpc.profiling.untimed import UntimedRecorder
from piper_hpc.spec import Workload
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.layout import Layout, RankMap
from piper_hpc.spec.model import ModelSpec
from piper_hpc.train import checkpoint, metrics
from piper_hpc.train.data import Dataset
from piper_hpc.train.optimizer import learning_rate, make_optimizer, set_learning_rate
from piper_hpc.train.record import Records, RecordShape, gather, rank_record
from piper_hpc.train.settings import WARMUP_STEPS, TrainSettings

GRAD_NORM_REDUCE = Message(ALL_RANKS, 0)
CLOCK_REFRESH_S = 30.0
"""Clocks of different nodes are compared again after this long; in between they are taken to drift steadily."""


class Trainer:
    """Model, optimizer and pipeline of one rank; `step` does one optimizer step and `record` says how it went."""

    def __init__(
        self,
        model: ModelSpec,
        layout: Layout,
        workload: Workload,
        settings: TrainSettings,
        *,
        rank_map: RankMap,
        device: torch.device,
        configs: AllToAllConfigs | None = None,
    ) -> None:
        dtype = getattr(torch, settings.dtype)
        timeout = timedelta(seconds=settings.collective_timeout_s)
        groups = make_groups(rank_map, timeout)
        placement = ExpertPlacement.linear(model.experts, layout.ep)
        self.experts = placement.experts_of(groups.place.shard)
        self.recorder = (Recorder if settings.timing else UntimedRecorder)(clock_for(device))
        self.dispatcher = make_dispatcher(rank_map, groups, timeout, configs)
        self.stage = Stage(
            model,
            layout.layers_by_stage(model.layers)[groups.place.stages[0]],
            sequence=workload.sequence,
            aux_scale=model.router_aux_coef / workload.global_batch,
            dispatcher=self.dispatcher,
            placement=placement,
            recorder=self.recorder,
            device=device,
            dtype=dtype,
        )
        initialise(self.stage, self.experts, layers=model.layers, seed=settings.seed)
        self.gradients = Gradients(self.stage, groups, layout)
        self.optimizer = make_optimizer(self.stage, settings)
        self.pipeline = Pipeline(
            self.stage,
            model=model,
            layout=layout,
            workload=workload,
            groups=groups,
            recorder=self.recorder,
            device=device,
            dtype=dtype,
        )
        self._shape = RecordShape.of(
            layout,
            layout.micro_batches(workload.global_batch),
            layers=model.layers,
            experts=model.experts,
            timed=settings.timing,
        )
        self._settings = settings
        self._groups = groups
        self._device = device
        self._clock_offset: ClockOffset | None = None
        self._peak_memory_bytes = 0
        self._norm = torch.zeros((), dtype=torch.float64, device=device)
        self.spans: list[Span] = []

    def _start_together(self) -> None:
        """Wait for all ranks; where it is time on any of them, all compare their clocks with rank 0's. Collective."""
        before, now_s = self._clock_offset, time.monotonic()
        due = torch.tensor([before is None or now_s - before.at_s > CLOCK_REFRESH_S], dtype=torch.int32)
        due = due.to(self._device)
        dist.all_reduce(due, dist.ReduceOp.MAX)  # a barrier whose result all ranks share
        if due.item():
            offset = compare_with_rank_0(self._device)
            self._clock_offset = offset if before is None else before.then(offset.at_s, offset.offset_s)

    def step(self, data: Dataset, first_sample: int, rate: float, *, sample_memory: bool) -> None:
        """One optimizer step on the samples from `first_sample` on, all ranks starting together."""
        if self._groups.world is not None:
            self._start_together()
        if self._device.type != "cpu":
            memory = torch.get_device_module(self._device)
            memory.reset_peak_memory_stats(self._device)
            self._step(data, first_sample, rate)
            self._peak_memory_bytes = memory.max_memory_allocated(self._device)
        elif sample_memory:
            self._peak_memory_bytes = peak_tensor_bytes(lambda: self._step(data, first_sample, rate))
        else:
            self._step(data, first_sample, rate)

    def _step(self, data: Dataset, first_sample: int, rate: float) -> None:
        recorder, gradients = self.recorder, self.gradients
        recorder.start()
        with recorder.region("other"):
            with recorder.region("host"):
                tokens = data.batch(first_sample).to(self._device)
                gradients.zero()
                for router in self.stage.routers().values():
                    router.reset()
                set_learning_rate(self.optimizer, rate)
                self.pipeline.step(tokens)
            with recorder.region("grad_reduce"):
                gradients.reduce()
            with recorder.region("optimizer"):
                squared_norm = gradients.squared_norm()
            if self._groups.world is not None:
                recorder.post(GRAD_NORM_REDUCE)
                with recorder.waiting(GRAD_NORM_REDUCE):
                    dist.all_reduce(squared_norm)
            with recorder.region("optimizer"):
                self._norm = squared_norm.sqrt()
                gradients.clip(self._norm, self._settings.grad_clip)
                self.optimizer.step()
        self.spans = recorder.finish()

    @property
    def _offset_s(self) -> float:
        """What brings times of the last step to rank 0's clock: the offset at its middle."""
        middle_s = (self.spans[0].start_s + self.spans[0].end_s) / 2
        return self._clock_offset.at(middle_s) if self._clock_offset is not None else 0.0

    def aligned_spans(self) -> list[Span]:
        """The spans of the last step on rank 0's clock."""
        offset_s = self._offset_s
        return [replace(each, start_s=each.start_s + offset_s, end_s=each.end_s + offset_s) for each in self.spans]

    def record(self) -> Records | None:
        """What all ranks know of the last step, on rank 0. Collective."""
        routers = self.stage.routers().values()
        mine = rank_record(
            self._shape,
            self.spans,
            self.recorder.posts(),
            self._offset_s,
            sent=self.dispatcher.pop_sent_bytes(),
            expert_tokens=torch.stack([router.tokens_per_expert for router in routers]).cpu().numpy(),
            loss=float(self.pipeline.loss.total),
            aux_loss=float(torch.stack([router.aux_loss for router in routers]).sum()),
            grad_norm=float(self._norm),
            peak_memory_bytes=self._peak_memory_bytes,
            rss_bytes=rss_bytes(),
        )
        return gather(mine, self._shape, self._device)


def train(
    model: ModelSpec,
    layout: Layout,
    workload: Workload,
    settings: TrainSettings,
    *,
    rank_map: RankMap,
    device: torch.device,
    data: Dataset,
    configs: AllToAllConfigs | None = None,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_spans: Callable[[int, Sequence[Span]], None] | None = None,
) -> None:
    """Train up to `settings.steps` optimizer steps; collective over the default process group, made by the caller.

    on_step gets each step's row of metrics, on rank 0 alone; its `wall_s` is from the row before (in the first, from
    the start) to this one, so that barrier, record, on_step itself and checkpoints are in it. on_spans gets
    (step, spans) on every rank, with times on rank 0's clock. With a `checkpoint_dir`, checkpoints are written there.
    `resume_from` is a folder of checkpoints, of any layout, whose newest is where to start; raises FileNotFoundError
    where it holds no whole one. configs: what was chosen where layout.all_to_all is auto.
    Rows of an attempt's first steps say `warmup`: their times are not representative.
    """
    trainer = Trainer(model, layout, workload, settings, rank_map=rank_map, device=device, configs=configs)
    progress = checkpoint.Progress(step=0, samples=0, seed=settings.seed)
    if resume_from is not None:
        newest = checkpoint.latest(resume_from)
        if newest is None:
            raise FileNotFoundError(f"resume_from={resume_from}: holds no whole checkpoint")
        progress = checkpoint.load(newest, trainer.stage, trainer.optimizer, trainer.experts)
    first, origin = progress.step, progress.samples
    row_made_s = time.monotonic()
    memory_step = min(first + WARMUP_STEPS, settings.steps) - 1
    for step in range(first, settings.steps):
        rate = learning_rate(step, settings)
        first_sample = origin + (step - first) * workload.global_batch
        trainer.step(data, first_sample, rate, sample_memory=step == memory_step)
        records = trainer.record()
        if records is not None and on_step is not None:
            row = metrics.summarise(records, layout, tokens=workload.tokens)
            row["wall_s"], row_made_s = time.monotonic() - row_made_s, time.monotonic()
            on_step(
                {"step": step, "learning_rate": rate, "warmup": step < first + WARMUP_STEPS}
                | row
                | _rates(row, settings, layout)
            )
        if on_spans is not None:
            on_spans(step, trainer.aligned_spans())
        done = step + 1
        due = settings.checkpoint_every and done % settings.checkpoint_every == 0
        if checkpoint_dir is not None and (due or done == settings.steps):
            reached = checkpoint.Progress(done, first_sample + workload.global_batch, settings.seed)
            checkpoint.save(checkpoint_dir, trainer.stage, trainer.optimizer, trainer.experts, reached)


def _rates(row: dict[str, Any], settings: TrainSettings, layout: Layout) -> dict[str, float]:
    """Rates in the step and by the wall clock, FLOPs in the model's convention; MFU is 0 where no peak is known."""
    flops_per_token = settings.flops_per_token / layout.ranks
    wall_tokens_per_s = row["tokens"] / row["wall_s"]
    mfu_per_token = flops_per_token / settings.peak_flops if settings.peak_flops else 0.0
    return {
        "flops_per_rank_per_s": row["tokens_per_s"] * flops_per_token,
        "mfu": row["tokens_per_s"] * mfu_per_token,
        "wall_tokens_per_s": wall_tokens_per_s,
        "wall_mfu": wall_tokens_per_s * mfu_per_token,
    }
