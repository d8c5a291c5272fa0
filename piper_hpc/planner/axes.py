"""The axes of the search and their values: conf/plan/default.yaml, or what the user gives instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.resource_model.all_to_all import ALGORITHMS
from piper_hpc.resource_model.schedule import SCHEDULES
from piper_hpc.spec import Layout, ModelSpec, Recompute

CHOICES = {"schedule": SCHEDULES, "all_to_all": ALGORITHMS, "placement": ("linear", "strided"), "zero": (0, 1, 2, 3)}
"""What an axis of names may hold; an axis of degrees holds numbers from 1, recompute what Recompute.parse reads."""


@dataclass(frozen=True)
class Axes:
    """Values of every axis, in the order in which they are tried; dp follows from the ranks. See spec.Layout."""

    pp: tuple[int, ...]
    vpp: tuple[int, ...]
    ep: tuple[int, ...]
    etp: tuple[int, ...]
    tp: tuple[int, ...]
    cp: tuple[int, ...]
    zero: tuple[int, ...]
    schedule: tuple[str, ...]
    micro_batch: tuple[int, ...]
    recompute: tuple[str, ...]
    all_to_all: tuple[str, ...]
    placement: tuple[str, ...]

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            works = f"plan.axes.{field.name}=[{getattr(Layout(), field.name)}]"
            if not values or len(set(values)) < len(values):
                raise ValueError(f"plan.axes.{field.name}={list(values)}: needs values, each once; use {works}")
            for value in values:
                if field.name == "recompute":
                    Recompute.parse(value)
                elif field.name in CHOICES and value not in CHOICES[field.name]:
                    allowed = ", ".join(map(str, CHOICES[field.name]))
                    raise ValueError(f"plan.axes.{field.name}: {value} must be one of {allowed}; use {works}")
                elif field.name not in CHOICES and value < 1:
                    raise ValueError(f"plan.axes.{field.name}: {value} must be at least 1; use {works}")

    @staticmethod
    def of(values: Mapping[str, Sequence[Any]]) -> Axes:
        """From the `axes` of a configuration. ValueError names the axis, the value, the rule and a value that works."""
        return Axes(**{axis: tuple(listed) for axis, listed in values.items()})

    @staticmethod
    def shipped() -> Axes:
        """Those of conf/plan/default.yaml."""
        return Axes.of(yaml.safe_load((data_folder("conf") / "plan" / "default.yaml").read_text())["axes"])

    @property
    def size(self) -> int:
        """Combinations, whether they fit or not."""
        return math.prod(len(getattr(self, field.name)) for field in fields(self))

    def only(self, allowed: Mapping[str, Sequence[Any]]) -> Axes:
        """The values that are also `allowed`, of the axes named there; `allowed` itself where an axis has none."""
        return replace(
            self,
            **{
                axis: tuple(value for value in getattr(self, axis) if value in values) or tuple(values)
                for axis, values in allowed.items()
            },
        )

    def of_model(self, model: ModelSpec) -> Axes:
        """Without values that name the same layout twice for this model: parts it has not cannot be recomputed.

        A dense model has no experts to place, so that ep, etp, algorithm and placement have one value.
        """
        without = {
            "mla_up": model.attention == "mla",
            "moe": bool(model.moe_layers),
        }
        seen: dict[Recompute, str] = {}
        for text in self.recompute:
            parts = Recompute.parse(text)
            kept = replace(parts, **{part: getattr(parts, part) * has for part, has in without.items()})
            seen.setdefault(Recompute(full=1) if kept.full else kept, text)
        alike = replace(self, recompute=tuple(seen.values()))
        if model.moe_layers:
            return alike
        return replace(alike, ep=(1,), etp=(1,), all_to_all=("flat",), placement=("linear",))
