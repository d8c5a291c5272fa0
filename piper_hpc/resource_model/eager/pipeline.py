"""What the order of a pipeline schedule means for one rank: which stages it holds, what waits, and what is alive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from piper_hpc.resource_model.schedule import rank_order
from piper_hpc.spec import Layout
from piper_hpc.spec.schedules import stage_of


@dataclass(frozen=True)
class Held:
    """One chunk of a rank: its layers, and whether it is the model's first or last stage."""

    layers: int
    first: bool
    last: bool


def held_chunks(layout: Layout, layers: int) -> list[tuple[Held, ...]]:
    """The chunks of every pipeline rank, [pp][vpp], of a model of `layers` layers."""
    ranges, last = layout.layers_by_stage(layers), layout.stages - 1
    chunks = [Held(len(each), stage == 0, stage == last) for stage, each in enumerate(ranges)]
    return [
        tuple(chunks[stage_of(layout.schedule, rank, chunk, layout.pp)] for chunk in range(layout.vpp))
        for rank in range(layout.pp)
    ]


def run_schedule(layout: Layout) -> str:
    """The order that runs: a single stage has no pipeline, and does forward and backward in turn."""
    return layout.schedule if layout.stages > 1 else "1f1b"


@lru_cache(maxsize=4096)
def split_micro_batches(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> tuple[int, ...]:
    """How many micro-batches of each chunk of `rank` have their weights' gradients computed apart, [vpp]."""
    late = [action.chunk for action in rank_order(schedule, rank, pp, vpp, micro_batches) if action.kind == "W"]
    return tuple(late.count(chunk) for chunk in range(vpp))


@lru_cache(maxsize=4096)
def most_alive(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each chunk that are alive at once, [moments][vpp]: the moments at which no other has as many.

    Whatever a micro-batch of a chunk keeps, the most that the rank holds is held at one of them: the same that
    `peak_held` finds, for many sizes at once.
    """
    order = rank_order(schedule, rank, pp, vpp, micro_batches)
    alive, moments = [0] * vpp, set()
    for action in order:
        for part in action.parts:
            if part.kind != "I":
                alive[part.chunk] += 1 if part.kind == "F" else -1
                moments.add(tuple(alive))
    return tuple(
        one
        for one in sorted(moments)
        if not any(one != two and all(a <= b for a, b in zip(one, two, strict=True)) for two in moments)
    )
