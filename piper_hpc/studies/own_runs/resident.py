"""Train every point a few times on the same ranks, point by point in turn, and record what each took."""

from __future__ import annotations

from typing import Any

from piper_hpc.runs import RunFolder
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.studies.jobs import asked_of
from piper_hpc.studies.own_runs.points import Asked, Point
from piper_hpc.studies.own_runs.predicting import PREDICTED, predictions
from piper_hpc.studies.training import Training, calibrated, cpu_terms, train
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import corpus_of
from piper_hpc.worker import run_task

MEASURED, CPU = "own_runs/measured", "own_runs/cpu"
"""Operators of the rows."""


def work(run_path: str) -> None:
    """Measure the points of the run in `run_path`, as far as its record does not have them yet."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """All points asked for, one repeat of all before the next; predictions are written before anything runs."""
    asked = Asked(**asked_of(context.run.path))
    cluster = calibrated(context)
    rows: list[dict[str, Any]] = broadcast_from_rank0(context.run.measurements)
    done = {(row["point"], row.get("repeat")) for row in rows if row["operator"] in (MEASURED, CPU)}
    if context.is_first and not any(row["operator"] == PREDICTED for row in rows):
        for prediction in predictions(asked.chosen, cluster):
            context.run.append_measurement(prediction, context.rank_env.attempt)
    corpus = corpus_of(context)
    for repeat in range(asked.repeats):
        for point in asked.chosen:
            if (point.name, repeat) in done:
                continue
            row = train(context, _training(point), corpus, memory=repeat == 0)
            if row is not None:
                about = {"operator": MEASURED, "point": point.name, "repeat": repeat}
                context.run.append_measurement(about | row, context.rank_env.attempt)
    for point in asked.chosen if context.device.type == "cpu" else ():
        if (point.name, None) not in done and (cpu_s := cpu_terms(context, _training(point), corpus)) is not None:
            context.run.append_measurement(
                {"operator": CPU, "point": point.name, "cpu_s": cpu_s}, context.rank_env.attempt
            )


def _training(point: Point) -> Training:
    return Training(point.model, point.layout, point.workload, point.routing)
