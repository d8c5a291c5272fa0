"""What the launcher reads: the shipped options, composed by Hydra and checked."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir

from piper_hpc.config import Experiment, check_experiment, register
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec


def experiment(*overrides: str) -> Experiment:
    """The facts of `launch <overrides>`. ConfigError as the launcher would print it."""
    register()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        return check_experiment(compose("config", overrides=list(overrides)))


@cache
def preset(name: str, *overrides: str) -> ModelSpec:
    """The model of `task=plan model=<name>` and what overrides it."""
    return experiment("task=plan", f"model={name}", *overrides).model
