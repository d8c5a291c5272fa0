"""From a composed configuration to checked facts: what every other room is given instead of Hydra's objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from piper_hpc.config import checks
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig, Config, DataConfig, TaskConfig, TrackingConfig, TrainConfig
from piper_hpc.spec import RECIPES, Layout, ModelSpec, Workload


@dataclass(frozen=True)
class Experiment:
    """One checked configuration. `layout` is None where it is planned first, or not needed."""

    task: TaskConfig
    model: ModelSpec
    layout: Layout | None
    workload: Workload
    cluster: ClusterConfig
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    runs: Path
    dry_run: bool
    submit: bool
    wait: bool
    format: str


def experiment(composed: DictConfig | dict[str, Any]) -> Experiment:
    """Check a composed configuration and turn it into facts.

    Raises ConfigError that lists every broken rule, each with a value that works.
    """
    merged = OmegaConf.merge(OmegaConf.structured(Config), composed)
    missing = sorted(str(key) for key in OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(*(Problem(key, "???", "must be given", checks.example_of(key)) for key in missing))
    config = cast(Config, OmegaConf.to_object(merged))

    model = ModelSpec(
        name=config.model.name,
        layers=config.model.layers,
        hidden=config.model.hidden,
        heads=config.model.heads,
        kv_heads=config.model.kv_heads,
        head_dim=config.model.head_dim or config.model.hidden // max(config.model.heads, 1),
        experts=config.model.experts,
        top_k=config.model.top_k,
        expert_ffn=config.model.expert_ffn,
        vocab=config.model.vocab,
        matrices_per_expert=config.model.matrices_per_expert,
        rope_theta=config.model.rope_theta,
        norm_eps=config.model.norm_eps,
        router_aux_coef=config.model.router_aux_coef,
    )
    problems = [
        *checks.choices(config),
        *checks.positive(config),
        *checks.paths(config),
    ]
    if not problems:
        problems += [*checks.model(model, config.train.dtype), *checks.train(config.train)]
    layout = None
    if not problems:
        problems += [*checks.racks(config), *checks.task(config, model)]
    # A plan chooses the layout, and micro-benchmarks need none: they ask only where ranks stand.
    if not problems and config.task.name in ("train", "profile") and not config.parallelism.auto:
        problems += checks.layout(config, model)
        layout = None if problems else _layout(config)
    if problems:
        raise ConfigError(*problems)
    return Experiment(
        task=config.task,
        model=model,
        layout=layout,
        workload=Workload(config.train.global_batch, config.train.sequence, RECIPES[config.train.dtype]),
        cluster=config.cluster,
        data=config.data,
        train=config.train,
        tracking=config.tracking,
        runs=Path(config.runs),
        dry_run=config.dry_run,
        submit=config.submit,
        wait=config.wait,
        format=config.format,
    )


def _layout(config: Config) -> Layout:
    degrees = {key: value for key, value in vars(config.parallelism).items() if key not in ("auto", "dp")}
    return Layout(dp=checks.replicas(config), **degrees)
