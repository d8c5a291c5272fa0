"""Seconds of what a rank does once a step, after its last backward: gradients reduced, clipped, weights updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.compute import MicroBatch
from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.groups import Group, StageGroups

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
    batch: MicroBatch,
    parameters: Sequence[tuple[int, int]],
    layers: int,
    groups: StageGroups,
    world: Group,
    zero: int,
    last_backward: Cost,
) -> UpdateCost:
    """The update of a rank with `layers` layers whose chunks have these (dense, expert) parameters.

    Dense parameters are replicated over the ranks of the stage, experts over their replicas. ZeRO 1 (arXiv 1910.02054,
    section 5.1): every replica gets the gradients of its own share of the parameters and adds them up, updates that
    share alone, and all gather the weights. last_backward: compute before the reduction, after which ranks arrive one
    by one.
    """
    curves, recipe = batch.curves, batch.recipe
    replicated = [
        copied for dense, experts in parameters for copied in ((groups.stage, dense), (groups.replicas, experts))
    ]
    reduce = _scatter_gradients if zero else _all_reduce_gradients
    reduced = total(reduce(batch, group, count) for group, count in replicated)
    held = sum(count for _, count in replicated)
    updated = sum(count / group.size for group, count in replicated) if zero else held
    gathered = total(
        communication.all_gather(curves, group, count * recipe.weight_bytes) for group, count in replicated if zero
    )
    # AdamW is measured on the type that is trained in; moments of wider numbers move as many times the bytes.
    adamw = curves.operation("adamw", updated * (recipe.moment_bytes / 2) / recipe.value_bytes)
    copied = batch.stream_bytes(updated * (recipe.master_bytes + recipe.weight_bytes), int(recipe.master_bytes > 0))
    host = curves.launches(HOST_OPERATIONS_PER_STEP + HOST_OPERATIONS_PER_LAYER * layers)
    return UpdateCost(
        before_norm={
            "host_s": host + batch.stream_bytes(held * recipe.gradient_bytes),
            "grad_reduce_s": reduced + communication.arrival_skew(curves, groups.stage, last_backward),
            "optimizer_s": batch.stream_bytes(updated * recipe.gradient_bytes),
        },
        after_norm={
            "grad_reduce_s": communication.all_reduce(curves, world, NORM_BYTES) + gathered,
            "optimizer_s": batch.stream_bytes(2 * updated * recipe.gradient_bytes) + adamw + copied,
        },
    )


def _all_reduce_gradients(batch: MicroBatch, group: Group, count: int) -> Cost:
    return communication.all_reduce(batch.curves, group, count * batch.recipe.gradient_bytes)


def _scatter_gradients(batch: MicroBatch, group: Group, count: int) -> Cost:
    """Each rank's shard from everyone, in one all-to-all, and their sum: all shards read, one written."""
    gradient_bytes = count * batch.recipe.gradient_bytes
    added = batch.stream_bytes(gradient_bytes * (1 + 1 / group.size), int(group.size > 1))
    return communication.all_to_all(batch.curves, group, gradient_bytes) + added
