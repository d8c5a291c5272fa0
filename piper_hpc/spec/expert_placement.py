"""Which rank of an expert group holds which logical expert, and where in its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertPlacement:
    """A versioned map from logical experts to the ranks of one expert group.

    rank_of_expert: expert -> rank within the expert group; slot_of_expert: expert -> index in that rank's stacked
    weights. Every rank holds equally many experts, slots counted from 0. `version` grows by one with each migration.
    """

    version: int
    rank_of_expert: tuple[int, ...]
    slot_of_expert: tuple[int, ...]

    def __post_init__(self) -> None:
        ranks = max(self.rank_of_expert) + 1
        per_rank = len(self.rank_of_expert) // ranks
        every_slot = {(rank, slot) for rank in range(ranks) for slot in range(per_rank)}
        if set(zip(self.rank_of_expert, self.slot_of_expert, strict=True)) != every_slot:
            raise ValueError(
                f"a placement must fill slots 0..{per_rank - 1} of each of its {ranks} ranks exactly once, "
                f"got ranks {self.rank_of_expert} and slots {self.slot_of_expert}"
            )

    @staticmethod
    def linear(experts: int, ranks: int) -> ExpertPlacement:
        """Experts in order, `experts / ranks` on each rank; raises ValueError where `ranks` does not divide."""
        if experts % ranks:
            raise ValueError(f"experts={experts} do not divide evenly over ep={ranks}: choose a divisor of {experts}")
        per_rank = experts // ranks
        return ExpertPlacement(
            0, tuple(e // per_rank for e in range(experts)), tuple(e % per_rank for e in range(experts))
        )

    @property
    def experts_per_rank(self) -> int:
        """Experts that each rank holds."""
        return len(self.rank_of_expert) // (max(self.rank_of_expert) + 1)

    def experts_of(self, rank: int) -> tuple[int, ...]:
        """Logical experts of one rank, in the order of its slots."""
        held = [expert for expert, owner in enumerate(self.rank_of_expert) if owner == rank]
        return tuple(sorted(held, key=lambda expert: self.slot_of_expert[expert]))

    def moved(self, rank_of_expert: Sequence[int]) -> ExpertPlacement:
        """The next version, with experts on these ranks: who stays keeps its slot, who comes takes what is free.

        Newcomers of a rank in order of their numbers, free slots likewise, so that all ranks agree. Raises ValueError
        unless every rank holds as many as before.
        """
        slots = list(self.slot_of_expert)
        for rank in range(max(self.rank_of_expert) + 1):
            taken = {
                slots[expert]
                for expert, (old, new) in enumerate(zip(self.rank_of_expert, rank_of_expert, strict=True))
                if old == new == rank
            }
            free = [slot for slot in range(self.experts_per_rank) if slot not in taken]
            coming = [e for e, new in enumerate(rank_of_expert) if new == rank and self.rank_of_expert[e] != rank]
            for expert, slot in zip(coming, free, strict=False):
                slots[expert] = slot
        return ExpertPlacement(self.version + 1, tuple(rank_of_expert), tuple(slots))


@dataclass(frozen=True)
class ExpertMove:
    """One expert's way from its slot on rank `source` of the expert group to another slot, maybe of the same rank."""

    expert: int
    source: int
    source_slot: int
    target: int
    target_slot: int


def moves_between(before: ExpertPlacement, after: ExpertPlacement) -> list[ExpertMove]:
    """All experts that change their place, by number."""
    places = zip(before.rank_of_expert, before.slot_of_expert, after.rank_of_expert, after.slot_of_expert, strict=True)
    return [ExpertMove(expert, *place) for expert, place in enumerate(places) if place[:2] != place[2:]]
