"""Checks a composed Hydra configuration and turns it into the typed `Experiment` that all other packages take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from piper_hpc.config import checks, keys, slurm_checks
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.model import model_spec
from piper_hpc.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    PlanConfig,
    SweepConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from piper_hpc.spec import RECIPES, TRAINED, Layout, ModelSpec, Recipe, Routing, SpecError, Workload, executor
from piper_hpc.spec.migration import MigrationSettings
from piper_hpc.spec.routing_workloads import drawn_shares


@dataclass(frozen=True)
class Experiment:
    """One checked configuration. `layout` is None where it is planned first, or not needed; its schedule may be `auto`,
    which `planning.schedule_of` replaces. all_to_all: its algorithm, which a plan for this project's executor takes
    too; model_sequence: tokens of a sequence of its own pre-training."""

    task: TaskConfig
    model: ModelSpec
    model_sequence: int | None
    layout: Layout | None
    all_to_all: str
    migration: MigrationSettings
    plan: PlanConfig
    workload: Workload
    cluster: ClusterConfig
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    sweep: SweepConfig
    runs: Path
    runs_mode: int
    dry_run: bool
    submit: bool
    wait: bool
    format: str


def check_experiment(composed: DictConfig | dict[str, Any]) -> Experiment:
    """Check a composed configuration and turn it into facts.

    Raises ConfigError that lists every broken rule, each with a value that works.
    """
    # Hydra opens the schema for `+key=value`, and the merge below takes over what was added to it.
    given = OmegaConf.to_container(composed, resolve=False) if isinstance(composed, DictConfig) else composed
    # First of all and alone: what else is wrong with a value would be told with the value.
    if found := list(slurm_checks.secrets(given)):
        raise ConfigError(*found)
    if added := list(keys.unknown(cast(dict[str, Any], given))):
        raise ConfigError(*added)
    # What Hydra composed has the schema's types already: half of the time that a check takes.
    is_typed = isinstance(composed, DictConfig) and OmegaConf.get_type(composed) is Config
    merged = composed if is_typed else OmegaConf.merge(OmegaConf.structured(Config), composed)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(*(Problem(key, "???", "must be given", checks.example_of(key)) for key in missing))
    if found := list(slurm_checks.secrets(OmegaConf.to_container(merged, resolve=True))):
        raise ConfigError(*found)  # a variable's value that an interpolation brought in
    config = cast(Config, OmegaConf.to_object(merged))

    problems = [
        *checks.choices(config),
        *checks.positive(config),
        *checks.paths(config),
        *slurm_checks.submission(config),
        *checks.plan(config),
    ]
    try:
        model = model_spec(config.model)
    except SpecError as error:
        raise ConfigError(*problems, *error.problems) from None
    if not problems:
        problems += checks.train(config.train)
        # Planning and measuring know models and layouts that the executor does not have.
        if config.task.name not in ("plan", "microbench"):
            problems += executor.missing_of_model(model, config.train.dtype)
            problems += checks.resume(config.train, model)
    layout = None
    if not problems:
        problems += [*checks.racks(config), *checks.routing(config, model), *checks.task(config, model)]
    # A plan chooses the layout, and micro-benchmarks need none: they ask only where ranks stand.
    if not problems and config.task.name in ("train", "profile") and not config.parallelism.auto:
        problems += checks.layout(config, model)
        layout = None if problems else checks.layout_of(config)
    if problems:
        raise ConfigError(*problems)
    return Experiment(
        task=config.task,
        model=model,
        model_sequence=config.model.sequence,
        layout=layout,
        all_to_all=config.parallelism.all_to_all,
        migration=MigrationSettings(
            config.parallelism.migration, config.parallelism.migration_every, config.parallelism.migration_threshold
        ),
        plan=config.plan,
        workload=Workload(
            config.train.global_batch,
            config.train.sequence,
            _recipe(config),
            _routing(config.train, model),
        ),
        cluster=config.cluster,
        data=config.data,
        train=config.train,
        tracking=config.tracking,
        sweep=config.sweep,
        runs=Path(config.runs),
        runs_mode=int(str(config.runs_mode), 8),
        dry_run=config.dry_run,
        submit=config.submit,
        wait=config.wait,
        format=config.format,
    )


def _recipe(config: Config) -> Recipe:
    """The precision recipe; a plan may ask for one that the executor lacks."""
    if config.task.name == "plan" and config.task.recipe is not None:
        return RECIPES[config.task.recipe]
    return TRAINED[config.train.dtype]


def _routing(config: TrainConfig, model: ModelSpec) -> Routing:
    """As configured, or else as the workload draws that forces it; of one that moves, as in a step."""
    asked = config.routing
    shares = tuple(asked.histogram or ())
    if asked.workload not in (None, "W0", "W7") and not shares and asked.skew == 1:
        drawn = "W2" if asked.workload == "W6" else str(asked.workload)
        shares = drawn_shares(drawn, model.experts, model.top_k, config.global_batch * config.sequence)
    return Routing(asked.mode, asked.capacity_factor, asked.skew, shares)
