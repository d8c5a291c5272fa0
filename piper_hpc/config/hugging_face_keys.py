"""Keys of a Hugging Face config.json, read one by one: typed, defaulted as `transformers` does, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.spec.rope import RopeScaling

Json = dict[str, Any]

ACTIVATIONS = {
    **{"silu": "auto", "swish": "auto", "swiglu": "auto"},
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"},
}
"""`hidden_act` of gated feed-forwards -> ModelSpec.activation."""


def refusal(key: str, value: object, rule: str, works: str) -> ConfigError:
    """What to raise for a key of the file."""
    return ConfigError(Problem(f"model.path: {key}", value, rule, works))


RELEASED = "the config.json that was released with the model"


def _typed(kind: type, config: Json, key: str, least: int | None) -> Any:
    """The value, which must be of that kind (an int also where a float is meant) and, a count, at least `least`."""
    value = config[key]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        called = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
        raise refusal(key, value, f"must be {called[kind]}", RELEASED)
    if kind is int and least is not None and value < least:
        raise refusal(key, value, f"must be a whole number, at least {least}", RELEASED)
    return value


def required(config: Json, key: str, kind: type = int) -> Any:
    """A key that the family has no default for."""
    if config.get(key) is None:
        raise refusal(key, None, "must be given: it decides the size of this family", RELEASED)
    return _typed(kind, config, key, least=1)


def optional(config: Json, key: str, default: Any) -> Any:
    """A key whose absence (or null) means `default`, as in the family's configuration class.

    Counts whose default is at least 1 (steps, intervals, heads) must be so too; the others must not be negative.
    """
    least = min(default, 1) if type(default) is int else None
    return default if config.get(key) is None else _typed(type(default), config, key, least)


def require_one_of(config: Json, key: str, allowed: Iterable[object], default: object) -> None:
    """Refuse a value that would make another model than the one that is modelled."""
    allowed = tuple(allowed)
    value = config.get(key, default)
    if value not in allowed:
        listed = ", ".join(str(each) for each in allowed)
        rule = f"is not modelled for this family; must be one of {listed}"
        raise refusal(key, value, rule, f'"{key}": {json.dumps(allowed[0])}')


def activation(config: Json, key: str = "hidden_act", default: str = "silu") -> str:
    """ModelSpec.activation of the file's."""
    require_one_of(config, key, ACTIVATIONS, default)
    return ACTIVATIONS[config.get(key, default)]


def rope_theta(config: Json) -> float:
    """The base of the rotary embedding; files of transformers 5 have it among `rope_parameters`."""
    return float(optional(config, "rope_theta", optional(_rope(config), "rope_theta", 10_000.0)))


def rope_fraction(config: Json, default: float) -> float:
    """The share of a head's width that is turned."""
    given = optional(_rope(config), "partial_rotary_factor", default)
    return float(optional(config, "partial_rotary_factor", float(given)))


def rope_scaling(config: Json) -> RopeScaling | None:
    """How the file stretches positions, None where it does not. Refused where it does in a way that is not modelled."""
    given = _rope(config)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in ("default", None):
        return None
    if kind not in ("yarn", "llama3", "linear", "longrope"):
        raise refusal("rope_scaling", given, "is of a kind that is not modelled", '"rope_scaling": null')
    if kind == "longrope":
        return RopeScaling(kind, factor=1.0)
    original = optional(given, "original_max_position_embeddings", 0)
    longest = optional(config, "max_position_embeddings", 0)
    factor = given.get("factor") or (longest / original if original and longest else None)
    if factor is None:
        raise refusal("rope_scaling", given, "must have a factor", RELEASED)
    numbers = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.0,
        "mscale_all_dim": 0.0,
        "attention_factor": 0.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    read = {key: float(optional(given, key, default)) for key, default in numbers.items()}
    return RopeScaling(kind, float(factor), original or longest, truncate=optional(given, "truncate", True), **read)


def _rope(config: Json) -> Json:
    found: Json = optional(config, "rope_parameters", optional(config, "rope_scaling", {}))
    return found
