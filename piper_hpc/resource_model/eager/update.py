"""Seconds of what a rank does once a step, after its last backward: gradients reduced, clipped, weights updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.groups import Group, StageGroups
from piper_hpc.spec import Recipe

NORM_BYTES = 8
"""The squared norm of all gradients is one float64."""

HOST_OPERATIONS_PER_STEP = 150
"""Batch preparation, zeroing of gradients and the learning rate, in eager operations: 0.6 ms where one takes 4 us,
measured once on a CPU."""

HOST_OPERATIONS_PER_LAYER = 2
"""The router's sums, set to zero before a step."""


@dataclass(frozen=True)
class UpdateCost:
    """Seconds by term, once a step. before_norm: from the last backward to the all-reduce of the gradient norm that all
    ranks clip by; after_norm: from that all-reduce to the end of the step."""

    before_norm: dict[str, Cost]
    after_norm: dict[str, Cost]

    @cached_property
    def before_norm_s(self) -> float:
        """Seconds between the last backward and the arrival at the norm."""
        return sum(cost.seconds for cost in self.before_norm.values())

    @cached_property
    def after_norm_s(self) -> float:
        """Seconds from the last rank's arrival at the norm to the end of the step."""
        return sum(cost.seconds for cost in self.after_norm.values())


def update_cost(
    curves: Curves,
    recipe: Recipe,
    parameters: Sequence[tuple[int, int]],
    layers: int,
    groups: StageGroups,
    world: Group,
    zero: int,
) -> UpdateCost:
    """The update of a rank with `layers` layers whose chunks have these (dense, expert) parameters.

    Dense parameters are replicated over the ranks of the stage, experts over their replicas. ZeRO 1 (arXiv 1910.02054,
    section 5.1): every replica gets the gradients of its own share of the parameters and adds them up, updates that
    share alone, and all gather the weights. Ranks are taken to arrive at the reduction together.
    """
    replicated = [
        copied for dense, experts in parameters for copied in ((groups.stage, dense), (groups.replicas, experts))
    ]
    held = sum(count for _, count in replicated)
    if zero:
        updated = sum(count / group.size for group, count in replicated)
        reduced = total(_scatter(curves, group, count * recipe.gradient_bytes) for group, count in replicated)
        gathered = total(_gather(curves, group, count * recipe.weight_bytes) for group, count in replicated)
    else:
        updated, gathered = float(held), Cost()
        reduced = total(
            communication.all_reduce(curves, group, count * recipe.gradient_bytes) for group, count in replicated
        )
    # AdamW is measured on the type that is trained in; moments of wider numbers move as many times the bytes.
    adamw = curves.operation("adamw", updated * (recipe.moment_bytes / 2) / recipe.value_bytes)
    copied_bytes = (recipe.master_bytes + recipe.weight_bytes) if recipe.master_bytes else 0
    host = curves.launches(HOST_OPERATIONS_PER_STEP + HOST_OPERATIONS_PER_LAYER * layers)

    def streamed(parameters: float, bytes_of_each: int) -> Cost:
        return curves.operation("elementwise", parameters * bytes_of_each)

    return UpdateCost(
        before_norm={
            "host_s": host + streamed(held, recipe.gradient_bytes),
            "grad_reduce_s": reduced,
            "optimizer_s": streamed(updated, recipe.gradient_bytes),
        },
        after_norm={
            "grad_reduce_s": communication.all_reduce(curves, world, NORM_BYTES) + gathered,
            "optimizer_s": streamed(updated, 2 * recipe.gradient_bytes) + adamw + streamed(updated, copied_bytes),
        },
    )


def _scatter(curves: Curves, group: Group, gradient_bytes: int) -> Cost:
    """Each rank's shard of the gradients from everyone, in one all-to-all, and their sum: all read, one written. Before
    it gradients are filled up, cut and joined into a shard for each rank, three copies."""
    if group.size == 1:
        return Cost()
    streamed = curves.operation("elementwise", gradient_bytes * (2 * 3 + 1 + 1 / group.size))
    return communication.all_to_all(curves, group, gradient_bytes) + streamed


def _gather(curves: Curves, group: Group, weight_bytes: int) -> Cost:
    """The weights of all shards on every rank, put back in two copies."""
    if group.size == 1:
        return Cost()
    return communication.all_gather(curves, group, weight_bytes) + curves.operation("elementwise", weight_bytes * 2 * 2)
