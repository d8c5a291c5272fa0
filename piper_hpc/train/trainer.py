"""One optimizer step of one rank: its chunks of the model, their parameters, the pipeline, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from piper_hpc.model import Stage
from piper_hpc.model.layer import MoELayer
from piper_hpc.model.names import initialise
from piper_hpc.parallel.dispatcher import AllToAllConfigs, make_dispatcher
from piper_hpc.parallel.groups import make_groups
from piper_hpc.parallel.migration import Migrated, migrate
from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.parallel.pipeline import Pipeline
from piper_hpc.profiling.clock import Clock, clock_for, compare_with_rank_0
from piper_hpc.profiling.memory import LiveBytes, rss_bytes
from piper_hpc.profiling.offset import ClockOffset
from piper_hpc.profiling.spans import ALL_RANKS, Message, Recorder, Span
from piper_hpc.profiling.untimed import UntimedRecorder
from piper_hpc.runs.checkpoints import Origin
from piper_hpc.runtime import progress
from piper_hpc.spec import Workload
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.layout import Layout, RankMap
from piper_hpc.spec.model import ModelSpec
from piper_hpc.train import checkpoint
from piper_hpc.train.data import Dataset
from piper_hpc.train.forced_routing import ForcedRouting
from piper_hpc.train.optimizer import Optimizer
from piper_hpc.train.record import Records, RecordShape, gather, rank_record
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.vote import NonFiniteError, Vote, end_of_step, non_finite_error

END_OF_STEP = Message(ALL_RANKS)
CLOCK_REFRESH_S = 30.0
"""Clocks of different nodes are compared again after this long; in between they are taken to drift steadily."""


class Trainer:
    """Model chunks, optimizer and pipeline of one rank; `step` does one optimizer step, `record` says how it went."""

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
        placements: Sequence[ExpertPlacement] | None = None,
        counted: Sequence[tuple[int, int]] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """placements: by global layer, where experts are; None: in order, to stay so.

        counted: (replica, micro-batch) of each sample of routing that ends up in every step's vote; None: one sample,
        the whole step. clock: that regions are timed by; None: the device's.
        """
        dtype = getattr(torch, settings.dtype)
        timeout = timedelta(seconds=settings.collective_timeout_s)
        groups = make_groups(rank_map, timeout)
        linear = ExpertPlacement.linear(model.experts, layout.ep)
        self.placements = [linear] * model.layers if placements is None else list(placements)
        self.recorder = (Recorder if settings.timing else UntimedRecorder)(clock or clock_for(device))
        self.dispatcher = make_dispatcher(rank_map, groups, timeout, configs)
        layers = layout.layers_by_stage(model.layers)
        self.chunks = [
            Stage(
                model,
                layers[stage],
                sequence=workload.sequence,
                aux_scale=1 / workload.global_batch,
                dispatcher=self.dispatcher,
                placements=self.placements,
                recorder=self.recorder,
                recompute=layout.recomputed,
                device=device,
                dtype=dtype,
                overlap_shared=layout.overlap_shared,
            )
            for stage in groups.place.stages
        ]
        experts = [placement.experts_of(groups.place.shard) for placement in self.placements]
        for chunk in self.chunks:
            initialise(chunk, experts, layers=model.layers, seed=settings.seed)
        self.store = ParameterStore(self.chunks, groups, layout, experts, experts_move=placements is not None)
        self.optimizer = Optimizer(self.store.buckets, settings)
        self.pipeline = Pipeline(
            self.chunks,
            model=model,
            layout=layout,
            workload=workload,
            groups=groups,
            recorder=self.recorder,
            device=device,
            dtype=dtype,
            on_gradients=self._start_reduction,
        )
        self._shape = RecordShape.of(
            layout,
            layout.micro_batches(workload.global_batch),
            layers=model.layers,
            experts=model.experts,
            timed=settings.timing,
        )
        self._layers_and_experts = (model.layers, model.experts)
        self._counted = counted
        self._forced: ForcedRouting | None = None
        if settings.routing is not None:
            self._forced = ForcedRouting(settings.routing, model, layout, workload, groups.place, settings.seed)
        self._global_batch = workload.global_batch
        self._migrated = Migrated(0, 0.0)
        self._settings = settings
        self._groups = groups
        self._device = device
        self._clock_offset: ClockOffset | None = None
        self.peak_memory_bytes = 0
        self._vote: Vote | None = None
        self.stop, self.save = False, False
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

    def step(self, data: Dataset, first_sample: int, rate: float, *, sample_memory: bool) -> Vote:
        """One optimizer step on the samples from `first_sample` on, all ranks starting together.

        Where a gradient is not finite, weights and moments stay as they are. `stop` and `save` are this rank's part in
        the vote.
        """
        if self._forced is not None:
            for index, layer in self.moe_layers().items():
                layer.forced = self._forced.ids(first_sample // self._global_batch, index, self._device)
        if self._groups.world is not None:
            self._start_together()
        if self._device.type != "cpu":
            memory = torch.get_device_module(self._device)
            memory.reset_peak_memory_stats(self._device)
            self._vote = self._step(data, first_sample, rate)
            self.peak_memory_bytes = memory.max_memory_allocated(self._device)
        elif sample_memory:
            with LiveBytes() as live:
                self._vote = self._step(data, first_sample, rate)
            self.peak_memory_bytes = live.peak_bytes
        else:
            self._vote = self._step(data, first_sample, rate)
        return self._vote

    def _step(self, data: Dataset, first_sample: int, rate: float) -> Vote:
        recorder, store = self.recorder, self.store
        recorder.start()
        with recorder.region("other"):
            with recorder.region("host"):
                tokens = data.batch(first_sample).to(self._device)
                store.zero()
                for layer in self.moe_layers().values():
                    layer.reset()
                progress.at("forward and backward passes")
                self.pipeline.step(tokens)
            with recorder.region("grad_reduce"):
                progress.at("reduction of gradients")
                store.finish_reduction()
            with recorder.region("optimizer"):
                squared_norm = store.squared_norm()
            recorder.post(END_OF_STEP)
            with recorder.waiting(END_OF_STEP):
                progress.at("reduction that ends the step")
                vote = end_of_step(
                    squared_norm, self.routed(), stop=self.stop, save=self.save, group=self._groups.world
                )
            if vote.finite:
                with recorder.region("optimizer"):
                    store.clip(vote.grad_norm, self._settings.grad_clip)
                    self.optimizer.step(rate)
                    for index, layer in self.moe_layers().items():
                        layer.router.after_step(vote.routed[:, index].sum(0))
                with recorder.region("grad_reduce"):
                    progress.at("gathering of weights")
                    store.publish()
        self.spans = recorder.finish()
        return vote

    def _start_reduction(self, chunk: int) -> None:
        with self.recorder.region("grad_reduce"):
            self.store.start_reduction(chunk)

    def moe_layers(self) -> dict[int, MoELayer]:
        """The layers of this rank that have experts, by global index."""
        return {index: layer for chunk in self.chunks for index, layer in chunk.moe_layers().items()}

    def routed(self) -> torch.Tensor:
        """int64 [samples, layers, experts]: what this rank routed in the samples, 0 in layers without experts and in
        those that it does not hold."""
        samples = 1 if self._counted is None else len(self._counted)
        counts = torch.zeros((samples, *self._layers_and_experts), dtype=torch.int64, device=self._device)
        replica = self._groups.place.replica
        for index, layer in self.moe_layers().items():
            if self._counted is None:
                counts[0, index] = torch.stack(layer.routed).sum(0)
                continue
            for sample, (of_replica, micro_batch) in enumerate(self._counted):
                if of_replica == replica:
                    counts[sample, index] = layer.routed[micro_batch]
        return counts

    def _expert_tokens(self) -> torch.Tensor:
        """int64 [layers of this rank, experts]: what it routed in the step, 0 in layers without experts."""
        layers, (_, experts) = self.moe_layers(), self._layers_and_experts
        nothing = torch.zeros(experts, dtype=torch.int64, device=self._device)
        held = [int(index) for chunk in self.chunks for index in chunk.layers]
        return torch.stack([torch.stack(layers[i].routed).sum(0) if i in layers else nothing for i in held])

    def migrate(self, placements: Sequence[ExpertPlacement]) -> None:
        """Bring experts to where `placements`, by global layer, say, before the next step. Collective."""
        moments = self.optimizer.moments
        self._migrated = migrate(self.store, moments, self.placements, placements, self._groups.expert)
        self.placements = list(placements)
        for chunk in self.chunks:
            chunk.place(self.placements)

    def non_finite_error(self, step: int) -> NonFiniteError:
        """What is not finite of the gradient of the last step, number `step`, the same on all ranks. Collective."""
        names = [name for bucket in self.store.buckets for name in bucket.non_finite()]
        return non_finite_error(step, names, self._groups.world)

    def load(self, path: Path, model: ModelSpec) -> checkpoint.Progress:
        """Take up the checkpoint `path`, see `checkpoint.load`. Collective."""
        return checkpoint.load(
            path,
            self.store,
            self.optimizer,
            model=model,
            seed=self._settings.seed,
            dtype=self._settings.dtype,
            group=self._groups.world,
        )

    def saver(self, folder: Path, origin: Origin, saved: checkpoint.Progress) -> checkpoint.Saver:
        """What writes checkpoints of all ranks into `folder`, next after `saved`."""
        return checkpoint.Saver(
            folder,
            origin,
            self.store,
            self.optimizer,
            saved=saved,
            every=self._settings.checkpoint_every,
            keep=self._settings.checkpoint_keep,
            keep_every=self._settings.checkpoint_keep_every,
            inodes=self._settings.checkpoint_inodes,
            group=self._groups.world,
            device=self._device,
            rank_of_expert=self._rank_of_expert,
        )

    def close(self) -> None:
        """Destroy the groups of this training, so that another can follow in the same processes. Collective."""
        if self._groups.world is not None:
            dist.barrier()
        self.dispatcher.close()
        self._groups.close()

    def _rank_of_expert(self) -> list[tuple[int, ...]]:
        """By layer; empty where no expert has moved."""
        moved = any(placement.version for placement in self.placements)
        return [placement.rank_of_expert for placement in self.placements] if moved else []

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
        """What all ranks know of the last step, and of the migration after it, on rank 0. Collective."""
        assert self._vote is not None, "no step was done yet"
        migrated, self._migrated = self._migrated, Migrated(0, 0.0)
        mine = rank_record(
            self._shape,
            self.spans,
            self.recorder.posts(),
            self._offset_s,
            sent=self.dispatcher.pop_sent_bytes(),
            expert_tokens=self._expert_tokens().cpu().numpy(),
            loss=float(self.pipeline.loss.total),
            aux_loss=float(sum(layer.aux_loss.item() for layer in self.moe_layers().values())),
            grad_norm=self._vote.grad_norm,
            peak_memory_bytes=self.peak_memory_bytes,
            rss_bytes=rss_bytes(),
            migration_s=migrated.seconds,
            migration_bytes=migrated.bytes,
        )
        return gather(mine, self._shape, self._device)
