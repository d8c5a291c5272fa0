"""Train every point a few times on the same ranks, point by point in turn, and record what each took."""

from __future__ import annotations

from typing import Any

from piper_hpc.runs import RunFolder
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.studies.jobs import asked_of
from piper_hpc.studies.own_runs.points import Asked
from piper_hpc.studies.own_runs.predicting import PREDICTED, predictions
from piper_hpc.studies.training import Training, calibrated, train
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import corpus_of
from piper_hpc.worker import run_task

MEASURED = "own_runs/measured"
"""Operator of the rows."""


def work(run_path: str) -> None:
    """Measure the points of the run in `run_path`, as far as its record does not have them yet."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """All points asked for, one repeat of all before the next; predictions are written before anything runs."""
    asked = Asked(**asked_of(context.run.path))
    cluster = calibrated(context)
    rows: list[dict[str, Any]] = broadcast_from_rank0(context.run.measurements)
    done = {(row["point"], row["repeat"]) for row in rows if row["operator"] == MEASURED}
    if context.is_first and not any(row["operator"] == PREDICTED for row in rows):
        for prediction in predictions(asked.chosen, cluster):
            context.run.append_measurement(prediction, context.rank_env.attempt)
    corpus = corpus_of(context)
    for repeat in range(asked.repeats):
        for point in asked.chosen:
            if (point.name, repeat) in done:
                continue
            training = Training(point.model, point.layout, point.workload, point.routing)
            row = train(context, training, corpus, memory=repeat == 0)
            if row is not None:
                about = {"operator": MEASURED, "point": point.name, "repeat": repeat}
                context.run.append_measurement(about | row, context.rank_env.attempt)
