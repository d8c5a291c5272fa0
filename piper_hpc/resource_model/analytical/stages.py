"""Which layers each pipeline rank holds, counted by kind (with experts or dense, attention window)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.layout import split_layers
from piper_hpc.spec.rules import LAYERS
from piper_hpc.spec.schedules import stage_of


class Kind(NamedTuple):
    """Layers that cost the same: with experts or without, and the window of their attention."""

    moe: bool
    window: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers that one rank runs as a unit: how many of each kind, and whether the model's ends are here."""

    layers: tuple[tuple[Kind, int], ...]
    first: bool
    last: bool


@lru_cache(maxsize=4096)
def chunks(model: ModelSpec, schedule: str, pp: int, vpp: int) -> tuple[tuple[Chunk, ...], ...]:
    """The chunks of every rank, [pp][vpp]. Layers are spread evenly; the first chunks take what is left over.

    So the last chunk, which also has the head, has never more layers than another. Raises ResourceModelError where
    one would have none.
    """
    if pp * vpp > model.layers:
        raise ResourceModelError(f"{LAYERS}; got pp={pp} vpp={vpp}, model.layers={model.layers}")
    layers_of = split_layers(model.layers, pp * vpp)
    placed = []
    for rank in range(pp):
        of_rank = []
        for chunk in range(vpp):
            stage = stage_of(schedule, rank, chunk, pp)
            kinds = Counter(Kind(model.is_moe(layer), model.window(layer)) for layer in layers_of[stage])
            of_rank.append(Chunk(tuple(sorted(kinds.items())), stage == 0, stage == pp * vpp - 1))
        placed.append(tuple(of_rank))
    return tuple(placed)


def kinds(model: ModelSpec) -> tuple[Kind, ...]:
    """Every kind of layer that the model has."""
    return tuple(sorted({Kind(model.is_moe(layer), model.window(layer)) for layer in range(model.layers)}))
