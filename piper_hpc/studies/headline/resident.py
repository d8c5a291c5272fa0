"""Plan, try and measure every strategy on the same ranks: settings once, then the best of each in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from piper_hpc.balance.balancer import Migration
from piper_hpc.parallel.dispatcher import AllToAllConfigs, expert_groups
from piper_hpc.resource_model.eager.migration import migration_prices
from piper_hpc.runs import RunFolder
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import AUTO, AllToAllConfig, ClusterSpec, Layout, Prediction
from piper_hpc.spec.migration import MigrationSettings
from piper_hpc.studies.headline.strategies import MODEL, STRATEGIES, WORKLOAD
from piper_hpc.studies.jobs import asked_of
from piper_hpc.studies.training import Training, calibrated, cpu_terms, train
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.train import corpus_of
from piper_hpc.worker import run_task

PREDICTED, TRIED, MEASURED, TRAINED, CPU = (
    f"headline/{row}" for row in ("predicted", "tried", "measured", "trained", "cpu")
)
"""Operators of the rows: a setting as predicted, and tried once; the best of each strategy repeat by repeat; the same
with the routing of the router that is trained; CPU seconds of exchange."""
BALANCED = "W0"
"""Routing of all but TRAINED: waiting for a busy rank is not exchange."""
MIGRATION_SETTINGS = MigrationSettings(AUTO, every=1, threshold=1.1)
"""A look after every step: these trainings are short."""


@dataclass(frozen=True)
class Asked:
    """What one run compares. Rates as in links.Links; settings: the model's best of each strategy, of which the best as
    tried stands for it; strategies: keys of STRATEGIES."""

    slowdown: float
    node_bytes_per_s: float
    nic_bytes_per_s: float
    repeats: int
    settings: int
    strategies: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """One of a strategy's best layouts, with the all-to-all of every pipeline rank."""

    strategy: str
    number: int
    layout: Layout
    all_to_alls: tuple[AllToAllConfig, ...]
    migration: Migration | None

    def training(self, context: Context, routing: str | None) -> Training:
        """As the ranks carry it out."""
        return Training(MODEL, self.layout, WORKLOAD, routing, self._configs(context), self.migration)

    def _configs(self, context: Context) -> AllToAllConfigs:
        places = context.rank_map(self.layout).places
        groups = expert_groups(context.rank_map(self.layout))
        return {ranks: self.all_to_alls[places[ranks[0]].pipeline_rank] for ranks in groups}


def work(run_path: str) -> None:
    """Compare in the run at `run_path`, whose folder says what."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """Calibrate, plan, try, choose, and measure."""
    asked = Asked(**asked_of(context.run.path))
    cluster = calibrated(context)
    settings: list[Setting] = broadcast_from_rank0(
        lambda: [each for key in asked.strategies for each in _settings(context, asked, key, cluster)]
    )
    corpus = corpus_of(context)

    def timed(
        setting: Setting, operator: str, repeat: int = 0, routing: str | None = BALANCED
    ) -> dict[str, Any] | None:
        row = train(context, setting.training(context, routing), corpus, memory=operator == TRIED)
        if row is not None:
            _append(context, setting, operator, row | {"repeat": repeat})
        return row

    tried = [timed(setting, TRIED) for setting in settings]
    chosen: list[Setting] = broadcast_from_rank0(lambda: _best(settings, tried))
    for repeat in range(asked.repeats):
        for setting in chosen if repeat % 2 else reversed(chosen):
            timed(setting, MEASURED, repeat)
    for setting in chosen:
        timed(setting, TRAINED, routing=None)
        cpu_s = cpu_terms(context, setting.training(context, BALANCED), corpus)
        if cpu_s is not None:
            _append(context, setting, CPU, {"cpu_s": cpu_s["dispatch_s"] + cpu_s["combine_s"]})


def _append(context: Context, setting: Setting, operator: str, row: dict[str, Any]) -> None:
    about = {"operator": operator, "strategy": setting.strategy, "setting": setting.number}
    context.run.append_measurement(about | row, context.rank_env.attempt)


def _settings(context: Context, asked: Asked, key: str, cluster: ClusterSpec) -> list[Setting]:
    """Those that are tried; their predictions go into the record."""
    strategy, found = STRATEGIES[key], []
    for number, prediction in enumerate(strategy.settings(cluster, asked.settings)):
        migration = None
        if strategy.migrates and prediction.layout.ep > 1:
            migration = Migration(MIGRATION_SETTINGS, migration_prices(MODEL, cluster, prediction.layout, WORKLOAD))
        setting = Setting(strategy.key, number, prediction.layout, _all_to_alls(prediction), migration)
        found.append(setting)
        row = {
            "layout": asdict(prediction.layout),
            "all_to_all": sorted({config.algorithm for config in setting.all_to_alls}),
            **{name: getattr(prediction, name) for name in ("step_time_s", "terms", "bubble_fraction")},
        }
        _append(context, setting, PREDICTED, row)
    return found


def _all_to_alls(prediction: Prediction) -> tuple[AllToAllConfig, ...]:
    stages = prediction.exchange["stages"]
    return tuple(AllToAllConfig(stage["algorithm"], stage["chunks"] or 0) for stage in stages)


def _best(settings: Sequence[Setting], tried: Sequence[dict[str, Any] | None]) -> list[Setting]:
    """The fastest setting of each strategy as tried."""
    best: dict[str, tuple[float, Setting]] = {}
    for setting, row in zip(settings, tried, strict=True):
        assert row is not None
        seconds = row["step_time_s"]
        if setting.strategy not in best or seconds < best[setting.strategy][0]:
            best[setting.strategy] = seconds, setting
    return [setting for _, setting in best.values()]
