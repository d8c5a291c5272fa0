"""Short trainings of many layouts one after the other on the same ranks, for studies that compare them."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from piper_hpc.balance.balancer import Migration, counted_samples
from piper_hpc.forecast import calibration_of
from piper_hpc.parallel.dispatcher import AllToAllConfigs
from piper_hpc.profiling.clock import Clock, ProcessClock
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import TERMS, ClusterSpec, ExpertPlacement, Layout, ModelSpec, Workload
from piper_hpc.tasks import microbench
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import prepare
from piper_hpc.train import metrics
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.record import Records
from piper_hpc.train.settings import WARMUP_STEPS, TrainSettings
from piper_hpc.train.trainer import Trainer

STEPS = 3
"""Steady ones of a training; their median counts."""
RATE = 1e-3


@dataclass(frozen=True)
class Training:
    """What is trained. routing: of piper_hpc.spec.routing_workloads, None: the router's own; configs: of
    all_to_all=auto; migration: None where experts stay."""

    model: ModelSpec
    layout: Layout
    workload: Workload
    routing: str | None = None
    configs: AllToAllConfigs | None = None
    migration: Migration | None = None


def calibrated(context: Context) -> ClusterSpec:
    """The cluster as it was granted, with its calibration, measured now if there is none, in all suites that the run's
    configuration names. Collective."""
    if not broadcast_from_rank0(lambda: calibration_of(context.experiment, context.granted) is not None):
        microbench.run(context)
    calibration = prepare(context)
    if calibration is None:
        raise ValueError("cluster.calibration=off: there is nothing to predict by; use cluster.calibration=auto")
    return context.granted.spec(context.experiment.cluster, calibration)


def train(context: Context, training: Training, corpus: Path, *, memory: bool = False) -> dict[str, Any] | None:
    """A few steps from the same weights on the same data: medians of the steady ones, on rank 0. Collective.

    memory: take the peak of every rank, in a warm-up step, as counting slows it down. `losses` has every step's.
    """
    settings = _settings(context, training, WARMUP_STEPS + STEPS)
    found: list[dict[str, Any]] = []
    losses: list[float] = []
    peaks: list[int] = []
    for step, (records, placements) in enumerate(_steps(context, training, settings, corpus, memory=memory)):
        if records is None:
            continue
        row = metrics.summarise(records, training.layout, tokens=training.workload.tokens, placements=placements)
        losses.append(row["loss"])
        if (memory and step == WARMUP_STEPS - 1) or context.device.type != "cpu":
            peaks = row["peak_memory_bytes"]
        if step >= WARMUP_STEPS:
            found.append(row)
    if not found:
        return None
    return {
        "step_time_s": median(row["step_time_s"] for row in found),
        "terms": {term: median(row[term] for row in found) for term in TERMS},
        "rank_load": median(max(row["rank_load"]) for row in found),
        "loss": losses[-1],
        "losses": losses,
        "payload_bytes": found[-1]["exchange"]["payload_bytes"],
        "peak_memory_bytes": peaks,
        "torch_threads": torch.get_num_threads(),
    }


def cpu_terms(context: Context, training: Training, corpus: Path) -> dict[str, float] | None:
    """CPU seconds that the mean rank takes in the first steady step by term, all threads of the process; on rank 0.
    Collective. Not to be timed: on this clock waiting takes no time, so that what is bubble and p2p means nothing."""
    settings, found = _settings(context, training, WARMUP_STEPS + 1), None
    for records, _ in _steps(context, training, settings, corpus, clock=ProcessClock()):
        if records is not None:
            by_rank = metrics.terms_by_rank(records, training.layout)
            found = {term: fmean(seconds.tolist()) for term, seconds in by_rank.items()}
    return found


def _settings(context: Context, training: Training, steps: int) -> TrainSettings:
    return TrainSettings(
        steps=steps, routing=training.routing, collective_timeout_s=context.experiment.cluster.comm_timeout_s
    )


def _steps(
    context: Context,
    training: Training,
    settings: TrainSettings,
    corpus: Path,
    *,
    memory: bool = False,
    clock: Clock | None = None,
) -> Iterator[tuple[Records | None, Sequence[ExpertPlacement]]]:
    """The records of all steps, on rank 0, and where experts were in each: they move between steps once that pays.
    Collective."""
    layout, workload = training.layout, training.workload
    rank_map = context.rank_map(layout)
    balancer = None
    if training.migration is not None:
        balancer = training.migration.balancer(training.model, layout, workload, settings.steps)
    trainer = Trainer(
        training.model,
        layout,
        workload,
        settings,
        rank_map=rank_map,
        device=context.device,
        configs=training.configs,
        placements=balancer.placements if balancer is not None else None,
        counted=counted_samples(layout.dp, layout.micro_batches(workload.global_batch)) if balancer else None,
        clock=clock,
    )
    data = ByteDataset(
        corpus,
        sequence=workload.sequence,
        global_batch=workload.global_batch,
        dense_dp=layout.dense_dp,
        place=rank_map.places[context.rank_env.rank],
        ep=layout.ep,
        seed=0,
    )
    for step in range(settings.steps):
        sampled = memory and step == WARMUP_STEPS - 1
        vote = trainer.step(data, step * workload.global_batch, RATE, sample_memory=sampled)
        placements = trainer.placements
        if balancer is not None:
            decision = balancer.after_step(step, vote.routed.cpu().numpy())
            if decision is not None and decision.placements is not None:
                trainer.migrate(decision.placements)
        yield trainer.record(), placements
    trainer.close()
    # Hooks and what they are hooked to hold each other; a next training of the same ranks would come on top of it.
    del trainer, data
    gc.collect()
