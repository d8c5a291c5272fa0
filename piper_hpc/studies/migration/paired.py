"""Training with experts that stay and with experts that move, on the same ranks, one step of each in turn.

Both see the same data and routing, and start with the same weights. What the machine does beside them meets both alike,
so that their ratio says more than two runs would.
"""

from __future__ import annotations

import time
from typing import Any

from piper_hpc.balance.balancer import counted_samples
from piper_hpc.runs import RunFolder
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import dataset, layout_of, migration_of, prepare, settings_of
from piper_hpc.train import metrics
from piper_hpc.train.optimizer import learning_rate
from piper_hpc.train.settings import WARMUP_STEPS
from piper_hpc.train.trainer import Trainer
from piper_hpc.worker import run_task

STAYING, MOVING = "staying", "moving"


def work(run_path: str) -> None:
    """Train the run in `run_path` twice at once, and add a row for each step of each to its measurements."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, paired))


def paired(context: Context) -> None:
    """All steps of both, as the configuration of the run says; it must have parallelism.migration."""
    experiment, layout = context.experiment, layout_of(context)
    calibration = prepare(context)
    settings = settings_of(experiment, calibration, experiment.train.steps)
    migration = migration_of(context, calibration, layout)
    if migration is None:
        raise ValueError("parallelism.migration=off: there is nothing to compare; use parallelism.migration=auto")
    balancer = migration.balancer(experiment.model, layout, experiment.workload, settings.steps)
    counted = counted_samples(layout.dp, layout.micro_batches(experiment.workload.global_batch))
    trainers = {
        name: Trainer(
            experiment.model,
            layout,
            experiment.workload,
            settings,
            rank_map=context.rank_map(layout),
            device=context.device,
            placements=balancer.placements if name == MOVING else None,
            counted=counted,
        )
        for name in (STAYING, MOVING)
    }
    data = dataset(context)
    for step in range(settings.steps):
        rate, first = learning_rate(step, settings), step * experiment.workload.global_batch
        for name in (STAYING, MOVING) if step % 2 else (MOVING, STAYING):
            trainer = trainers[name]
            vote = trainer.step(data, first, rate, sample_memory=False)
            told: dict[str, Any] = {}
            placements = trainer.placements
            if name == MOVING:
                looked_s = time.monotonic()
                decision = balancer.after_step(step, vote.routed.cpu().numpy())
                looked_s = time.monotonic() - looked_s
                if decision is not None and decision.placements is not None:
                    trainer.migrate(decision.placements)
                told = (decision.document() if decision is not None else {}) | {"planning_s": looked_s}
            records = trainer.record()
            if records is None:
                continue
            row = metrics.summarise(records, layout, tokens=experiment.workload.tokens, placements=placements)
            context.run.append_measurement(
                {"operator": "migration", "variant": name, "step": step, "warmup": step < WARMUP_STEPS}
                | {key: row[key] for key in ("step_time_s", "loss", "rank_load", "expert_load")}
                | {"migration": told | metrics.migrated(records)}
            )
