"""Expert migration: when it is looked for, by which planner, and what balance and moves are worth."""

from __future__ import annotations

from dataclasses import dataclass

OFF, AUTO = "off", "auto"
MIGRATIONS = (OFF, AUTO, "lpt", "swap")
"""Values of parallelism.migration: none, the best planner, or one by its name (piper_hpc.balance.planners)."""


@dataclass(frozen=True)
class LevelPrice:
    """A row that enters a domain of several ranks from another. domain_of_rank: by rank of the expert group; row_s:
    seconds of a step for one row; dedup: whether a token's choices share one row there."""

    domain_of_rank: tuple[int, ...]
    row_s: float
    dedup: bool


@dataclass(frozen=True)
class MigrationPrices:
    """What the resource model says of one rank's rows and of moving experts, on the calibrated cluster.

    ep, top_k: ranks of an expert group, and choices of a token; row_s: seconds that one more row on the busiest rank
    adds to a layer, forward and backward, exchanges included; levels: beside it, of rows between domains; expert_s:
    seconds to move the state of one expert of one layer to another rank.
    """

    ep: int
    top_k: int
    row_s: float
    expert_s: float
    levels: tuple[LevelPrice, ...] = ()


@dataclass(frozen=True)
class MigrationSettings:
    """When experts move.

    planner: of MIGRATIONS; every: steps between looks, and of a window of counts that a plan is made
    from; threshold: imbalance (busiest rank over the mean, mean over micro-batches) below which nothing is planned.
    """

    planner: str
    every: int
    threshold: float
