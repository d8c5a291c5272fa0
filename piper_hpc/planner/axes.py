"""The axes of the search and their values: conf/plan/default.yaml, or what the user gives instead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.spec import ALGORITHMS, Layout, ModelSpec, Problem, Recompute, SpecError, executor
from piper_hpc.spec.schedules import SCHEDULES

CHOICES = {
    "schedule": SCHEDULES,
    "all_to_all": tuple(ALGORITHMS),
    "placement": ("linear", "strided"),
    "zero": (0, 1, 2, 3),
}
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
        if problems := [
            problem for field in fields(self) for problem in _problems(field.name, getattr(self, field.name))
        ]:
            raise SpecError(*problems)

    @staticmethod
    def of(values: Mapping[str, Sequence[Any]]) -> Axes:
        """From the `axes` of a configuration. SpecError names the axis, the value, the rule and a value that works."""
        return Axes(**{axis: tuple(listed) for axis, listed in values.items()})

    @staticmethod
    def shipped() -> Axes:
        """Those of conf/plan/default.yaml, with every all-to-all algorithm of the registry."""
        given = yaml.safe_load((data_folder("conf") / "plan" / "default.yaml").read_text())["axes"]
        return Axes.of({"all_to_all": tuple(ALGORITHMS)} | given)

    @property
    def size(self) -> int:
        """Combinations, whether they fit or not."""
        return math.prod(len(getattr(self, field.name)) for field in fields(self))

    @property
    def trains(self) -> bool:
        """Whether this project's executor has every value of every axis."""
        return all(
            executor.trains_with(field.name, value) for field in fields(self) for value in getattr(self, field.name)
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


def _problems(axis: str, values: Sequence[Any]) -> Iterator[Problem]:
    key = f"plan.axes.{axis}"
    works = f"{key}=[{getattr(Layout(), axis)}]"
    if not values or len(set(values)) < len(values):
        yield Problem(key, list(values), "needs values, each of them once", works)
    for value in values:
        if axis == "recompute":
            try:
                Recompute.parse(value)
            except ValueError as error:
                yield Problem(key, value, str(error), works)
        elif axis in CHOICES and value not in CHOICES[axis]:
            yield Problem(key, value, f"must be one of {', '.join(map(str, CHOICES[axis]))}", works)
        elif axis not in CHOICES and value < 1:
            yield Problem(key, value, "must be at least 1", works)
