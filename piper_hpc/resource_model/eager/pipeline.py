"""What the order of a pipeline schedule means for one rank: which stages it holds, what waits, and what is alive."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from piper_hpc.resource_model.schedule import rank_order
from piper_hpc.spec import LayerKind, Layout, ModelSpec
from piper_hpc.spec.schedules import holders, stage_of

Alive = tuple[tuple[int, ...], ...]
"""Micro-batches of each chunk from their forward on, then of each between I and W, [moments][2 vpp]."""


@dataclass(frozen=True)
class Held:
    """One chunk of a rank: its layers by kind, whether it is the model's first or last stage, and whether the same rank
    holds the next one too."""

    kinds: tuple[tuple[LayerKind, int], ...]
    first: bool
    last: bool
    turns: bool = False

    @property
    def layers(self) -> int:
        """How many layers."""
        return sum(count for _, count in self.kinds)

    @property
    def moe_layers(self) -> int:
        """How many of them have experts."""
        return sum(count for kind, count in self.kinds if kind.moe)


def held_chunks(layout: Layout, model: ModelSpec) -> tuple[tuple[Held, ...], ...]:
    """The chunks of every pipeline rank, [pp][vpp], of a model."""
    return _held_chunks(layout.schedule, layout.pp, layout.vpp, layout.stage_layers, model)


@lru_cache(maxsize=4096)
def _held_chunks(
    schedule: str, pp: int, vpp: int, stage_layers: tuple[int, ...], model: ModelSpec
) -> tuple[tuple[Held, ...], ...]:
    ranges, last = Layout(pp=pp, vpp=vpp, stage_layers=stage_layers).layers_by_stage(model.layers), pp * vpp - 1
    ranks = holders(schedule, pp, vpp)
    chunks = [
        Held(model.kinds(each), stage == 0, stage == last, pp > 1 and stage < last and ranks[stage] == ranks[stage + 1])
        for stage, each in enumerate(ranges)
    ]
    return tuple(tuple(chunks[stage_of(schedule, rank, chunk, pp)] for chunk in range(vpp)) for rank in range(pp))


@lru_cache(maxsize=4096)
def neighbours_by_rank(schedule: str, pp: int, vpp: int) -> tuple[int, ...]:
    """Boundaries of stages over which each pipeline rank exchanges messages with another, [pp]."""
    count = [0] * pp
    for sender, receiver in pairwise(holders(schedule, pp, vpp)):
        if sender != receiver:
            count[sender] += 1
            count[receiver] += 1
    return tuple(count)


@lru_cache(maxsize=4096)
def chunk_links(
    schedule: str, pp: int, vpp: int, boundaries: tuple[str | None, ...]
) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Tiers of the links over which each chunk has messages, to the stages before and after it, [pp][vpp].

    boundaries: as in groups.LayoutGroups.
    """

    def links(stage: int) -> tuple[str, ...]:
        return tuple(tier for tier in boundaries[max(0, stage - 1) : stage + 1] if tier is not None)

    return tuple(tuple(links(stage_of(schedule, rank, chunk, pp)) for chunk in range(vpp)) for rank in range(pp))


def run_schedule(layout: Layout) -> str:
    """The order that runs: a single stage has no pipeline, and does forward and backward in turn."""
    return layout.schedule if layout.stages > 1 else "1f1b"


@lru_cache(maxsize=4096)
def split_micro_batches(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> tuple[int, ...]:
    """How many micro-batches of each chunk of `rank` have their weights' gradients computed apart, [vpp]."""
    late = [action.chunk for action in rank_order(schedule, rank, pp, vpp, micro_batches) if action.kind == "W"]
    return tuple(late.count(chunk) for chunk in range(vpp))


def alive_by_rank(layout: Layout, micro_batches: int) -> list[Alive]:
    """`most_alive` of every pipeline rank, [pp]."""
    schedule, pp, vpp = run_schedule(layout), layout.pp, layout.vpp
    return [most_alive(schedule, rank, pp, vpp, micro_batches) for rank in range(pp)]


@lru_cache(maxsize=4096)
def most_alive(schedule: str, rank: int, pp: int, vpp: int, micro_batches: int) -> Alive:
    """Micro-batches of each chunk that are alive at once, at the moments at which no other has as many.

    Whatever a micro-batch of a chunk keeps, and whatever I leaves for W, the most that the rank holds is held at one of
    them: what `peak_held` finds for one size, for all sizes.
    """
    alive, moments = [0] * (2 * vpp), set()
    for action in rank_order(schedule, rank, pp, vpp, micro_batches):
        for part in action.parts:
            if part.kind != "I":
                alive[part.chunk] += 1 if part.kind == "F" else -1
            if part.kind in ("I", "W"):
                alive[vpp + part.chunk] += 1 if part.kind == "I" else -1
            moments.add(tuple(alive))
    return tuple(
        one
        for one in sorted(moments)
        if not any(one != two and all(a <= b for a, b in zip(one, two, strict=True)) for two in moments)
    )
