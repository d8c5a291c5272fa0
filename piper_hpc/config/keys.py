"""Keys that no group of the schema has: Hydra's `+key=value` adds them, and nothing would read them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from piper_hpc.config.errors import Problem
from piper_hpc.config.schema import Config
from piper_hpc.spec.secrets import NOT_SHOWN, has_secret


def unknown(given: Mapping[Any, Any], schema: type = Config, prefix: str = "") -> Iterator[Problem]:
    """Every key of `given` that `schema` has no field for, each with the known key nearest to it in spelling.

    Keys of a field that is a free dictionary (cluster.environment, cluster.switches) are the user's own.
    """
    groups, entries = _nested(schema)
    fields = {field.name for field in dataclasses.fields(schema)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in fields:
            yield from _problems(name, value)
        elif not isinstance(value, Mapping):
            continue
        elif key in groups:
            yield from unknown(value, groups[key], f"{name}.")
        elif key in entries:
            for entry, facts in value.items():
                if isinstance(facts, Mapping):
                    yield from unknown(facts, entries[key], f"{name}.{entry}.")


@cache
def _nested(schema: type) -> tuple[dict[str, type], dict[str, type]]:
    """Fields that are a group of keys of their own, and fields that are a dictionary of such groups: name -> group."""
    groups: dict[str, type] = {}
    entries: dict[str, type] = {}
    for name, hint in typing.get_type_hints(schema).items():
        for each in (hint, *typing.get_args(hint)):  # the argument of Optional, the value of a dict
            if dataclasses.is_dataclass(each):
                (entries if typing.get_origin(hint) is dict else groups)[name] = typing.cast(type, each)
    return groups, entries


def _known(schema: type = Config, prefix: str = "") -> Iterator[str]:
    groups, _ = _nested(schema)
    for field in dataclasses.fields(schema):
        if field.name in groups:
            yield from _known(groups[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def _problems(name: str, value: Any) -> Iterator[Problem]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _problems(f"{name}.{key}", inner)
        return
    known = list(_known())
    (nearest,) = difflib.get_close_matches(name, known, 1, cutoff=0.0)
    rule = f"is no key of the configuration; the nearest is {nearest}, and `--cfg job` prints them all"
    yield Problem(name, NOT_SHOWN if has_secret(f"{name}={value}") else value, rule, f"the command without +{name}")
