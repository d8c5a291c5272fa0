"""Train every point a few times on the same ranks, point by point in turn, and record what each took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from piper_hpc.resource_model.predict import predict
from piper_hpc.runs import RunFolder
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import TERMS, Calibration
from piper_hpc.studies.own_runs.points import Asked, Point
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import corpus_of, prepare
from piper_hpc.train import metrics
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.settings import WARMUP_STEPS, TrainSettings
from piper_hpc.train.trainer import Trainer
from piper_hpc.worker import run_task

STEPS = 4
"""Steady ones of a point in one repeat; their median counts."""
PREDICTED, MEASURED = "own_runs/predicted", "own_runs/measured"
"""Operators of the rows."""


def work(run_path: str) -> None:
    """Measure the points of the run in `run_path`, as far as its record does not have them yet."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """All points asked for, one repeat of all before the next; predictions are written before anything runs."""
    asked = Asked.read(context.run.path)
    calibration = prepare(context)
    if calibration is None:
        raise ValueError("cluster.calibration=off: there is nothing to predict by; use cluster.calibration=auto")
    rows: list[dict[str, Any]] = broadcast_from_rank0(context.run.measurements)
    done = {(row["point"], row["repeat"]) for row in rows if row["operator"] == MEASURED}
    if context.is_first and not any(row["operator"] == PREDICTED for row in rows):
        _predict(context, calibration, asked.chosen)
    corpus = corpus_of(context)
    for repeat in range(asked.repeats):
        for point in asked.chosen:
            if (point.name, repeat) in done:
                continue
            row = train(context, point, corpus, memory=repeat == 0)
            if row is not None:
                about = {"operator": MEASURED, "point": point.name, "repeat": repeat}
                context.run.append_measurement(about | row, context.rank_env.attempt)


def _predict(context: Context, calibration: Calibration, points: Sequence[Point]) -> None:
    cluster = context.granted.spec(context.experiment.cluster, calibration)
    for point in points:
        found = predict(point.model, cluster, point.layout, point.workload).document()
        kept = {
            key: found[key] for key in ("step_time_s", "terms", "intervals", "peak_memory_bytes", "bubble_fraction")
        }
        context.run.append_measurement({"operator": PREDICTED, "point": point.name} | kept, context.rank_env.attempt)


def train(context: Context, point: Point, corpus: Path, *, memory: bool) -> dict[str, Any] | None:
    """A few steps of one point: medians of the steady ones, on rank 0. Collective.

    memory: take the peak of every rank, in a warm-up step, as counting slows it down.
    """
    layout, workload = point.layout, point.workload
    rank_map = context.rank_map(layout)
    settings = TrainSettings(
        steps=WARMUP_STEPS + STEPS,
        routing=point.routing,
        collective_timeout_s=context.experiment.cluster.comm_timeout_s,
    )
    trainer = Trainer(point.model, layout, workload, settings, rank_map=rank_map, device=context.device)
    data = ByteDataset(
        corpus,
        sequence=workload.sequence,
        global_batch=workload.global_batch,
        dense_dp=layout.dense_dp,
        place=rank_map.places[context.rank_env.rank],
        ep=layout.ep,
        seed=0,
    )
    found: list[dict[str, Any]] = []
    peaks: list[int] = []
    for step in range(settings.steps):
        sampled = memory and step == WARMUP_STEPS - 1
        trainer.step(data, step * workload.global_batch, 1e-3, sample_memory=sampled)
        records = trainer.record()
        if records is None:
            continue
        row = metrics.summarise(records, layout, tokens=workload.tokens)
        if sampled or context.device.type != "cpu":
            peaks = row["peak_memory_bytes"]
        if step >= WARMUP_STEPS:
            found.append(row)
    trainer.close()
    del trainer
    if not found:
        return None
    return {
        "step_time_s": median(row["step_time_s"] for row in found),
        "terms": {term: median(row[term] for row in found) for term in TERMS},
        "rank_load": median(max(row["rank_load"]) for row in found),
        "loss": found[-1]["loss"],
        "peak_memory_bytes": peaks,
        "torch_threads": torch.get_num_threads(),
    }
