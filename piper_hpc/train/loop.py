"""The training loop: optimizer steps with their records, checkpoints, and how it ends."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from piper_hpc.balance.balancer import Migration, counted_samples
from piper_hpc.parallel.dispatcher import AllToAllConfigs
from piper_hpc.profiling.spans import Span
from piper_hpc.runs.checkpoints import Origin, Sidecar
from piper_hpc.runtime import progress
from piper_hpc.spec import Workload
from piper_hpc.spec.layout import Layout, RankMap
from piper_hpc.spec.model import ModelSpec
from piper_hpc.train import checkpoint, metrics
from piper_hpc.train.data import Dataset
from piper_hpc.train.optimizer import learning_rate
from piper_hpc.train.settings import WARMUP_STEPS, TrainSettings
from piper_hpc.train.trainer import Trainer
from piper_hpc.train.vote import NonFiniteError

STEPS_LOOKED_AT = 20
"""The longest of so many last steps is how long one more may take."""


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
    migration: Migration | None = None,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    stop_asked: Callable[[float], bool] | None = None,
    on_stop: Callable[[], None] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_spans: Callable[[int, Sequence[Span]], None] | None = None,
    on_routed: Callable[[np.ndarray], None] | None = None,
) -> int:
    """Train up to `settings.steps` optimizer steps; collective over the default process group, made by the caller.

    on_step gets each step's row of metrics, on rank 0 alone; its `wall_s` is from the row before (in the first, from
    the start) to this one, so that barrier, record, on_step itself and checkpoints are in it. on_spans gets
    (step, spans) on every rank, with times on rank 0's clock; on_routed, on every rank, what all routed in a step,
    int64 [samples, layers, experts] (piper_hpc.balance.balancer.counted_samples). With a `checkpoint_dir`, checkpoints
    are written there.
    `resume_from` is a checkpoint, of any layout, to start from. configs: what was chosen where layout.all_to_all is
    auto. migration: when experts move, and what that is worth; None: they stay. stop_asked: whether this rank asks to
    end, given the seconds that one more step and a checkpoint take; all ranks then end after the same step, with a
    checkpoint. on_stop: called on every rank once they have agreed to. Returns the number of steps done by then.

    Rows of an attempt's first steps say `warmup`: their times are not representative. A row of a step that was skipped
    has why in `skipped`. Raises NonFiniteError on all ranks, and CheckpointError.
    """
    balancer, counting = None, migration is not None or on_routed is not None
    if migration is not None:
        begun = Sidecar.read(resume_from).rank_of_expert if resume_from is not None else ()
        balancer = migration.balancer(model, layout, workload, settings.steps, begun)
    trainer = Trainer(
        model,
        layout,
        workload,
        settings,
        rank_map=rank_map,
        device=device,
        configs=configs,
        placements=None if balancer is None else balancer.placements,
        counted=counted_samples(layout.dp, layout.micro_batches(workload.global_batch)) if counting else None,
    )
    reached = checkpoint.Progress(step=0, samples=0) if resume_from is None else trainer.load(resume_from, model)
    saver = None
    if checkpoint_dir is not None:
        origin = Origin.of(model, rank_map, configs, seed=settings.seed, dtype=settings.dtype)
        saver = trainer.saver(checkpoint_dir, origin, reached)
    first, done, first_sample = reached.step, reached.step, reached.samples
    row_made_s = saved_s = time.monotonic()
    durations_s: deque[float] = deque(maxlen=STEPS_LOOKED_AT)
    memory_step = min(first + WARMUP_STEPS, settings.steps) - 1
    failure: NonFiniteError | None = None
    for step in range(first, settings.steps):
        rate = learning_rate(step, settings)
        began_s = time.monotonic()
        progress.at("beginning", step)
        needed_s = max(durations_s, default=0.0) + (saver.expected_s if saver is not None else 0.0)
        trainer.stop = stop_asked is not None and stop_asked(needed_s)
        trainer.save = 0 < settings.checkpoint_every_s <= began_s - saved_s
        vote = trainer.step(data, first_sample, rate, sample_memory=step == memory_step)
        done = step + 1
        first_sample += workload.global_batch
        skipped = None if vote.finite else trainer.non_finite_error(step)
        if skipped is None:
            reached = checkpoint.Progress(done, first_sample)
        elif settings.on_non_finite == "stop":
            failure = skipped
            break
        placements, decision = trainer.placements, None
        if on_routed is not None:
            on_routed(vote.routed.cpu().numpy())
        if balancer is not None and vote.finite:
            looked_s = time.monotonic()
            decision = balancer.after_step(step, vote.routed.cpu().numpy())
            looked_s = time.monotonic() - looked_s
            if decision is not None and decision.placements is not None:
                trainer.migrate(decision.placements)
        progress.at("gathering of records")
        records = trainer.record()
        if records is not None and on_step is not None:
            row = metrics.summarise(records, layout, tokens=workload.tokens, placements=placements)
            if balancer is not None and balancer.is_look(step):
                row["routed"] = metrics.tokens_by_group(records, layout).sum(axis=0).tolist()
            if decision is not None:
                row["migration"] = decision.document() | metrics.migrated(records) | {"planning_s": looked_s}
            row["wall_s"], row_made_s = time.monotonic() - row_made_s, time.monotonic()
            on_step(
                {"step": step, "learning_rate": rate, "warmup": step < first + WARMUP_STEPS}
                | row
                | _rates(row, settings, layout)
                | ({} if skipped is None else {"skipped": str(skipped), "grad_norm": math.nan})
            )
        if on_spans is not None:
            on_spans(step, trainer.aligned_spans())
        if vote.stop and on_stop is not None:
            on_stop()
        if saver is not None:
            progress.at("checkpoint")
            if vote.save:
                saved_s = time.monotonic()
            saver.after_step(reached, asked=vote.save)
        if vote.stop:
            break
        durations_s.append(time.monotonic() - began_s)
    progress.at("end of training")
    if saver is not None:
        if failure is None:
            saver.save(reached)
        saver.close()
    if failure is not None:
        raise failure
    return done


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
