"""A ModelSpec from the configuration's model keys, or from a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.hugging_face import from_hf
from piper_hpc.config.schema import ModelConfig, RopeScalingConfig
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.rope import RopeScaling

FACTS = tuple(fact.name for fact in dataclasses.fields(ModelSpec))
REQUIRED = tuple(fact.name for fact in dataclasses.fields(ModelSpec) if fact.default is dataclasses.MISSING)


def preset(name: str) -> ModelSpec:
    """The model of `conf/model/NAME.yaml`. Raises FileNotFoundError where there is none."""
    text = (data_folder("conf") / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    return model_spec(ModelConfig(**yaml.safe_load(text)))


def model_spec(config: ModelConfig) -> ModelSpec:
    """The facts that a configuration gives; where `path` is given, over those of that config.json.

    Raises SpecError (or ConfigError, which is one) that names every key that is missing or broken.
    """
    given = {key: getattr(config, key) for key in FACTS if getattr(config, key) is not None}
    if "rope_scaling" in given:
        given["rope_scaling"] = _rope_scaling(given["rope_scaling"])
    if config.path is not None:
        return dataclasses.replace(from_hf(_read(config.path)), **given)
    if "head_dim" not in given and {"hidden", "heads"} <= given.keys():
        given["head_dim"] = _head_dim(given)
    missing = [key for key in REQUIRED if key not in given]
    if "name" in missing:
        rule = f"must be given where the model's own keys are not: {', '.join(missing)}"
        raise ConfigError(Problem("model.path", None, rule, "model.path=config.json"))
    if missing:
        raise ConfigError(*(Problem(f"model.{key}", "???", "must be given", f"model.{key}=1") for key in missing))
    return ModelSpec(**given)


def _rope_scaling(given: RopeScalingConfig | Mapping[str, Any] | RopeScaling) -> RopeScaling:
    """From the typed configuration, a file's mapping, or a record's."""
    facts = given if isinstance(given, Mapping) else vars(given)
    return RopeScaling(**facts)


def _head_dim(given: dict[str, Any]) -> int:
    if given.get("attention") == "mla":
        return int(given.get("qk_nope_dim", 0) + given.get("qk_rope_dim", 0))
    return int(given["hidden"] // max(given["heads"], 1))


def _read(path: str) -> dict[str, Any]:
    works = "model.path=config.json"
    try:
        found = json.loads(Path(path).expanduser().read_text())
    except OSError as error:
        rule = f"cannot be read ({error.strerror}): must be a Hugging Face config.json"
        raise ConfigError(Problem("model.path", path, rule, works)) from error
    except ValueError as error:  # bad JSON, or not text at all
        rule = f"is not JSON ({error}): must be a Hugging Face config.json"
        raise ConfigError(Problem("model.path", path, rule, works)) from error
    if not isinstance(found, dict):
        raise ConfigError(
            Problem("model.path", path, "holds no JSON object: must be a Hugging Face config.json", works)
        )
    return found
