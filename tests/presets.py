"""Presets of conf/model as the launcher reads them."""

from __future__ import annotations

from functools import cache

from hydra import compose, initialize_config_dir

from piper_hpc.config import check_experiment, register
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec


@cache
def preset(name: str, *overrides: str) -> ModelSpec:
    """`task=plan model=<name>` and what overrides it, composed by Hydra and checked."""
    register()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        return check_experiment(compose("config", overrides=["task=plan", f"model={name}", *overrides])).model
