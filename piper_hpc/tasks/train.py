"""task=train: measure first where nothing is measured, predict, train, and record every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from piper_hpc.balance.balancer import Migration
from piper_hpc.config import ConfigError, Experiment, Problem
from piper_hpc.config.token_sources import token_sources
from piper_hpc.forecast import calibration_of, forecast
from piper_hpc.profiling.spans import Span
from piper_hpc.resource_model.eager.migration import migration_prices
from piper_hpc.resource_model.flops import FLOP_CONVENTION, flops_per_token
from piper_hpc.runs import Status
from piper_hpc.runs.checkpoints import CheckpointError, Sidecar, newest
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import Calibration, Layout, RankPlace
from piper_hpc.spec.migration import OFF, MigrationPrices
from piper_hpc.submit.payload import ENDING
from piper_hpc.tasks.all_to_all import selected_configs
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.leaving import Leaving, Left
from piper_hpc.tasks.microbench import measure
from piper_hpc.tokens.mixture import Mixture
from piper_hpc.tracking import GuardedTracker, NoTracker, Tracker, make
from piper_hpc.tracking.guard import LIMIT_S
from piper_hpc.train.corpus import find_files, prepare_on_all_ranks, standard_library_files
from piper_hpc.train.data import ByteDataset, Dataset, TokenDataset
from piper_hpc.train.loop import train
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.tokens import open_on_all_ranks

CHECKPOINT_MIN = 30.0
"""Minutes between checkpoints on Slurm, where the configuration does not say: what a failure may cost."""


def run(context: Context) -> Left | None:
    """Train for `train.steps` steps; on the first rank why it ended before, if it did."""
    calibration = prepare(context)
    return execute(context, calibration, context.experiment.train.steps)


def prepare(context: Context) -> Calibration | None:
    """The calibration of this run, measured now if there is none; rank 0 writes prediction and manifest."""
    # One rank looks and tells: a file that another run writes meanwhile must not send the ranks different ways.
    found: list[Calibration | None] = [None]
    if context.is_first:
        found = [calibration_of(context.experiment, context.granted)]
    dist.broadcast_object_list(found, src=0)
    (calibration,) = found
    measurable = context.experiment.cluster.calibration == "auto" and context.experiment.train.dtype != "float64"
    if calibration is None and measurable:
        calibration = measure(context)
    if context.is_first:
        # What was predicted before the job stands where the nodes were granted as they were assumed.
        before = context.run.prediction()
        assumed = before is not None and context.topology_as_assumed
        names = sorted(set(context.nodes))
        if before is not None and calibration is not None:
            assumed &= calibration.provenance.get("nodes") in (None, ", ".join(names))
            assumed &= before["calibration"]["provenance"] == calibration.provenance  # links may have been missing
        if calibration is not None and not assumed:
            prediction = forecast(context.experiment, context.granted, calibration, names)
            context.run.write_prediction(
                replace(prediction, notes=[*prediction.notes, context.granted_note]).document()
            )
        manifest = context.run.manifest()
        context.run.write_manifest(manifest | {"job": manifest["job"] | facts(context, calibration)})
    return calibration


def facts(context: Context, calibration: Calibration | None) -> dict[str, Any]:
    """What a training run adds to the manifest: who is where in the layout, and what its rates refer to."""
    return {
        "rank_map": [_rank_record(place) for place in context.rank_map(layout_of(context)).places],
        "peak_flops": calibration.peak_flops if calibration else None,
        "peak_flops_source": f"best GEMM rate in {calibration.source}" if calibration else "none: MFU is not known",
        "flop_convention": FLOP_CONVENTION,
    }


def layout_of(context: Context) -> Layout:
    """The layout of the run, which planning has settled before the job began."""
    layout = context.experiment.layout
    assert layout is not None
    return layout


def settings_of(experiment: Experiment, calibration: Calibration | None, steps: int) -> TrainSettings:
    """The trainer's settings from the configuration."""
    chosen = experiment.train
    return TrainSettings(
        steps=steps,
        seed=chosen.seed,
        learning_rate=chosen.learning_rate,
        minimum_learning_rate=chosen.minimum_learning_rate,
        schedule=chosen.lr_schedule,
        warmup_steps=chosen.warmup_steps,
        weight_decay=chosen.weight_decay,
        beta1=chosen.beta1,
        beta2=chosen.beta2,
        grad_clip=chosen.grad_clip,
        dtype=chosen.dtype,
        checkpoint_every=chosen.checkpoint_every,
        checkpoint_every_s=60 * checkpoint_minutes(experiment),
        checkpoint_keep=chosen.checkpoint_keep,
        checkpoint_keep_every=chosen.checkpoint_keep_every,
        checkpoint_inodes=chosen.checkpoint_inodes,
        on_non_finite=chosen.on_non_finite,
        peak_flops=calibration.peak_flops if calibration else 0.0,
        flops_per_token=flops_per_token(experiment.model, chosen.sequence),
        collective_timeout_s=experiment.cluster.comm_timeout_s,
        routing=chosen.routing.workload,
        timing=chosen.timing,
    )


def checkpoint_minutes(experiment: Experiment) -> float:
    """Between checkpoints; 0: none by the clock."""
    chosen = experiment.train
    if chosen.checkpoint_min is not None:
        return chosen.checkpoint_min
    by_default = experiment.cluster.scheduler == "slurm" and experiment.task.name == "train"
    return CHECKPOINT_MIN if by_default and not chosen.checkpoint_every else 0.0


def keeps_checkpoints(experiment: Experiment) -> bool:
    """Whether a run writes any: on a cluster training does, unless all keys say no."""
    chosen = experiment.train
    last = chosen.checkpoint_last
    if last is None:
        last = experiment.cluster.scheduler == "slurm" and experiment.task.name == "train"
    return bool(last or chosen.checkpoint_every or checkpoint_minutes(experiment))


def corpus_of(context: Context) -> Path:
    """The bytes to learn, as a file that every rank reads, the same on all. Collective.

    Raises ConfigError with data=tokens, as studies that ask for bytes count on a vocabulary of them.
    """
    chosen, here = context.experiment.data, context.rank_env
    if chosen.name == "tokens":
        raise ConfigError(Problem("data", chosen.name, "text is read as bytes here", "data=stdlib"))
    files = standard_library_files() if chosen.path is None else find_files(chosen.path)
    return prepare_on_all_ranks(files, Path(chosen.cache), here.node, first_on_node=here.local_rank == 0).path


def dataset(context: Context) -> Dataset:
    """The samples to learn, the same on all ranks, and which of a step this rank takes. Collective."""
    workload, layout, here = context.experiment.workload, layout_of(context), context.rank_env
    chosen, seed = context.experiment.data, context.experiment.train.seed
    if chosen.name == "tokens":
        folders, weights = zip(*token_sources(chosen), strict=True)
        mixture = Mixture(
            open_on_all_ranks(folders, here.node),
            weights,
            sequence=workload.sequence,
            seed=seed,
            mask_document_starts=chosen.document_starts == "mask",
        )
        place = context.rank_map(layout).places[here.rank]
        return TokenDataset(
            mixture, global_batch=workload.global_batch, dense_dp=layout.dense_dp, place=place, ep=layout.ep
        )
    return ByteDataset(
        corpus_of(context),
        sequence=workload.sequence,
        global_batch=workload.global_batch,
        dense_dp=layout.dense_dp,
        place=context.rank_map(layout).places[here.rank],
        ep=layout.ep,
        seed=seed,
    )


def migration_of(context: Context, calibration: Calibration | None, layout: Layout) -> Migration | None:
    """When experts move and what that is worth, the same on all ranks; None where they stay. Collective."""
    experiment = context.experiment
    asked = experiment.migration
    if asked.planner == OFF or layout.ep == 1 or calibration is None:
        return None

    def on_first_rank() -> MigrationPrices:
        cluster = context.granted.spec(experiment.cluster, calibration)
        return migration_prices(experiment.model, cluster, layout, experiment.workload)

    return Migration(asked, broadcast_from_rank0(on_first_rank))


def _resume_from(context: Context) -> Path | None:
    """The checkpoint to start from, the same on all ranks. Collective.

    A requeued job goes on from its own newest checkpoint, a new one from `train.resume_from`. Raises CheckpointError
    where that has none. The record says what was taken.
    """

    def on_first_rank() -> Path | None:
        found = newest(context.run.checkpoints) if context.rank_env.attempt > 0 else None
        given = context.experiment.train.resume_from
        if found is None and given is not None:
            folder = Path(given).expanduser()
            found = newest(folder)
            if found is None:
                raise CheckpointError.of(folder, "holds no whole checkpoint")
        if found is not None:
            sidecar = Sidecar.read(found)
            same = sidecar.origin.same_place(context.rank_map(layout_of(context)))
            record = {"resumed": {"checkpoint": str(found), "step": sidecar.step, "same_layout_and_nodes": same}}
            manifest = context.run.manifest()
            context.run.write_manifest(manifest | {"job": manifest["job"] | record})
            number = context.rank_env.attempt
            context.run.write_attempt(number, context.run.attempt(number) | {"from_step": sidecar.step})
        return found

    return broadcast_from_rank0(on_first_rank)


def _tracker(context: Context) -> Tracker:
    """The view of the run, on its first rank: what fails in it ends no training, and peers do not give up on it."""
    asked = context.experiment.tracking
    if not context.is_first or asked.name == "none":
        return NoTracker()
    limit_s = min(LIMIT_S, context.experiment.cluster.comm_timeout_s / 2)
    return GuardedTracker(partial(make, asked.name, project=asked.project, entity=asked.entity), limit_s)


def execute(
    context: Context,
    calibration: Calibration | None,
    steps: int,
    traces: list[tuple[int, Sequence[Span]]] | None = None,
) -> Left | None:
    """Train `steps` steps with the record and its views; `traces`, if given, keeps the spans of every step.

    Returns, on the first rank, why it ended before the last step; None where it did not.
    """
    experiment, layout = context.experiment, layout_of(context)
    tracker = _tracker(context)
    if context.is_first:
        tracker.start(context.run.config(), context.run.path)

    def on_step(row: dict[str, Any]) -> None:
        context.run.append_metrics(row, context.rank_env.attempt)
        context.run.write_status(Status("running", context.rank_env.attempt, step=row["step"]))
        tracker.log(row)

    leaving = Leaving.of(context)
    resume_from = _resume_from(context)
    routed: list[np.ndarray] = []

    def on_routed(counts: np.ndarray) -> None:
        if context.is_first:
            routed.append(counts)

    try:
        done = train(
            experiment.model,
            layout,
            experiment.workload,
            settings_of(experiment, calibration, steps),
            rank_map=context.rank_map(layout),
            device=context.device,
            data=dataset(context),
            configs=selected_configs(context, calibration, layout, resume_from),
            migration=migration_of(context, calibration, layout),
            checkpoint_dir=context.run.checkpoints if keeps_checkpoints(experiment) else None,
            resume_from=resume_from,
            stop_asked=leaving.asked,
            on_stop=ENDING.stay,
            on_step=on_step,
            on_routed=on_routed if experiment.train.routing.record else None,
            on_spans=None if traces is None else lambda step, spans: traces.append((step, spans)),
        )
    except BaseException:
        tracker.finish("failed")
        raise
    if context.is_first and routed:
        context.run.write_routed(np.stack(routed))
    tracker.finish("completed")
    return leaving.why(done, steps) if context.is_first and done < steps else None


def _rank_record(place: RankPlace) -> dict[str, Any]:
    """One rank of the manifest's `rank_map`; `stage` is the first that it holds, and its pipeline rank."""
    return {"stage": place.pipeline_rank} | vars(place)
