"""Train every variant a few times on the same ranks, one after the other in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from piper_hpc.balance.balancer import Migration
from piper_hpc.balance.planners import evened
from piper_hpc.parallel.dispatcher import expert_groups
from piper_hpc.resource_model.eager.migration import migration_prices
from piper_hpc.resource_model.predict import predict
from piper_hpc.runs import RunFolder
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import AUTO, ClusterSpec, Workload
from piper_hpc.studies.ablation.variants import MIGRATION, Variant, variants
from piper_hpc.studies.headline.resident import MIGRATION_SETTINGS
from piper_hpc.studies.headline.strategies import MODEL
from piper_hpc.studies.jobs import asked_of
from piper_hpc.studies.training import Training, calibrated, train
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import corpus_of
from piper_hpc.worker import run_task

PREDICTED, MEASURED = "ablation/predicted", "ablation/measured"
"""Operators of the rows."""


@dataclass(frozen=True)
class Asked:
    """What one run measures: names of variants, and how often each."""

    variants: tuple[str, ...]
    repeats: int

    @property
    def chosen(self) -> list[Variant]:
        """The variants, in the order of `variants()`."""
        return [variant for variant in variants() if variant.name in self.variants]


def work(run_path: str) -> None:
    """Measure the variants of the run at `run_path`, whose folder says which."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """Predictions first, then repeat by repeat."""
    asked = Asked(**asked_of(context.run.path))
    cluster = calibrated(context)
    if context.is_first:
        _predict(context, cluster, asked.chosen)
    trainings = {variant.name: _training(context, variant, cluster) for variant in asked.chosen}
    corpus = corpus_of(context)
    for repeat in range(asked.repeats):
        for variant in asked.chosen if repeat % 2 else reversed(asked.chosen):
            row = train(context, trainings[variant.name], corpus)
            if row is not None:
                _append(context, MEASURED, variant, row | {"repeat": repeat})


def _append(context: Context, operator: str, variant: Variant, row: dict[str, Any]) -> None:
    about = {"operator": operator, "variant": variant.name}
    context.run.append_measurement(about | row, context.rank_env.attempt)


def _predict(context: Context, cluster: ClusterSpec, chosen: Sequence[Variant]) -> None:
    for variant in chosen:
        if variant.sequential is not None:
            continue  # the resource model prices HALO in the order that it is shipped with
        found = predict(MODEL, cluster, variant.layout, _workload(variant))
        _append(context, PREDICTED, variant, {"step_time_s": found.step_time_s, "terms": found.terms})


def _workload(variant: Variant) -> Workload:
    """As the variant sees it once experts have moved, where they do."""
    workload = variant.workload
    if MIGRATION not in variant.parts:
        return workload
    return replace(workload, routing=evened(workload.routing, MODEL.experts, variant.layout.ep))


def _training(context: Context, variant: Variant, cluster: ClusterSpec) -> Training:
    layout, workload, migration, configs = variant.layout, variant.workload, None, None
    if MIGRATION in variant.parts:
        prices = broadcast_from_rank0(lambda: migration_prices(MODEL, cluster, layout, workload))
        migration = Migration(MIGRATION_SETTINGS, prices)
    if variant.sequential is not None:
        layout = replace(layout, all_to_all=AUTO)
        configs = {ranks: variant.sequential for ranks in expert_groups(context.rank_map(layout))}
    return Training(MODEL, layout, workload, variant.routing, configs, migration)
