"""The variants of an ablation: one model at EP 8 and at PP 2 x EP 4, with the parts that a layout can use. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from piper_hpc.spec import FLAT, AllToAllConfig, Layout, Routing, Workload
from piper_hpc.spec.routing_workloads import drawn_shares
from piper_hpc.studies.headline.strategies import MODEL

HALO, DEDUP, OVERLAP, SCHEDULE, MIGRATION = "HALO", "dedup", "overlap", "schedule", "migration"
PARTS = (HALO, DEDUP, OVERLAP, SCHEDULE, MIGRATION)
OVER_ALL, LOCALISED = "EP8", "PP2xEP4"
BASES = {OVER_ALL: Layout(ep=8, micro_batch=4), LOCALISED: Layout(pp=2, ep=4, micro_batch=2)}
"""Localisation by the pipeline is the step from the first to the second."""
BATCH, SEQUENCE = 32, 64
EVEN, SKEWED = "W0", "W2"
"""Migration has something to do on skewed routing alone; the other parts are measured on even one."""
ALGORITHM = {
    frozenset(): FLAT.name,
    frozenset({HALO}): "halo",
    frozenset({DEDUP}): "flat_dedup",
    frozenset({HALO, DEDUP}): "halo_dedup",
}
ZERO_BUBBLE = "zb_h1"


@dataclass(frozen=True)
class Variant:
    """A base with some parts. HALO comes with its chunks and the order of its phases that overlap unless OVERLAP is
    taken away."""

    base: str
    parts: frozenset[str]
    routing: str = EVEN

    @property
    def name(self) -> str:
        """Unique among all variants."""
        skewed = [] if self.routing == EVEN else ["skewed"]
        return " + ".join([self.base, *(part for part in PARTS if part in self.parts), *skewed])

    @property
    def layout(self) -> Layout:
        """As it is trained and predicted."""
        base = BASES[self.base]
        schedule = ZERO_BUBBLE if SCHEDULE in self.parts else base.schedule
        return Layout(
            pp=base.pp, ep=base.ep, micro_batch=base.micro_batch, schedule=schedule, all_to_all=self.algorithm
        )

    @property
    def algorithm(self) -> str:
        """Of dispatch and combine."""
        return ALGORITHM[self.parts & {HALO, DEDUP}]

    @property
    def sequential(self) -> AllToAllConfig | None:
        """How HALO runs without overlap: phase after phase, all rows at once."""
        if HALO not in self.parts or OVERLAP in self.parts:
            return None
        return AllToAllConfig(self.algorithm, chunks=1, overlap="none")

    @property
    def workload(self) -> Workload:
        """With the shares by expert that the routing draws."""
        if self.routing == EVEN:
            return Workload(BATCH, SEQUENCE)
        shares = drawn_shares(self.routing, MODEL.experts, MODEL.top_k, BATCH * SEQUENCE)
        return Workload(BATCH, SEQUENCE, routing=Routing(histogram=shares))


def used(base: str) -> frozenset[str]:
    """The parts that a base can use at all: a schedule needs a pipeline."""
    return frozenset(PARTS) - ({SCHEDULE} if BASES[base].pp == 1 else set())


def alone(base: str, part: str) -> tuple[Variant, Variant] | None:
    """(without, with) of a part switched on alone; None where it acts on nothing: overlap needs HALO."""
    if part not in used(base) or part == OVERLAP:
        return None
    routing = SKEWED if part == MIGRATION else EVEN
    parts = {part, OVERLAP} if part == HALO else {part}
    return Variant(base, frozenset(), routing), Variant(base, frozenset(parts), routing)


def taken_away(base: str, part: str) -> tuple[Variant, Variant] | None:
    """(without, with) of a part taken away from all; None where it acts on nothing."""
    if part not in used(base):
        return None
    routing = SKEWED if part == MIGRATION else EVEN
    every = used(base) if part == MIGRATION else used(base) - {MIGRATION}
    # Without HALO there is nothing to overlap.
    gone = {HALO, OVERLAP} if part == HALO else {part}
    return Variant(base, every - gone, routing), Variant(base, every, routing)


def localised() -> tuple[tuple[Variant, Variant], tuple[Variant, Variant]]:
    """(without, with) of localisation: with no other part, and with all of them."""
    every = [Variant(base, used(base) - {MIGRATION}) for base in BASES]
    return (Variant(OVER_ALL, frozenset()), Variant(LOCALISED, frozenset())), (every[0], every[1])


def variants() -> list[Variant]:
    """All that a table needs, each once."""
    return list(dict.fromkeys(_pairs()))


def _pairs() -> Iterator[Variant]:
    for pair in localised():
        yield from pair
    for base in BASES:
        for part in PARTS:
            for found in (alone(base, part), taken_away(base, part)):
                yield from found or ()
