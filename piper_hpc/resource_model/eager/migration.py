"""What balance is worth and what moving experts costs, for the run that decides about it (arXiv 2605.05049, VI)."""

from __future__ import annotations

from piper_hpc.resource_model.eager import communication, compute
from piper_hpc.resource_model.eager.compute import MicroBatch
from piper_hpc.resource_model.eager.dispatch import dispatch_combine
from piper_hpc.resource_model.eager.step import StepPricer
from piper_hpc.resource_model.topology import NODE
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Recipe, Workload, get_algorithm
from piper_hpc.spec.migration import LevelPrice, MigrationPrices

MESSAGE_BYTES = 64 * 2**20
"""An expert's state is sent in pieces of about this size (piper_hpc.parallel.migration.STAGING_BYTES)."""


def moved_bytes(model: ModelSpec, recipe: Recipe, *, copies: int, zero: int) -> float:
    """Bytes of one expert of one layer that one replica sends: its weights, and its master and moments, of which it has
    a share with ZeRO. 14 a parameter for bf16 with a float32 master, 12 for float32."""
    state_bytes = (recipe.master_bytes + recipe.moment_bytes) / (copies if zero else 1)
    weight_bytes = recipe.weight_bytes
    if zero and not recipe.master_bytes and copies > 1:
        state_bytes += recipe.weight_bytes / copies  # of weights that are their own master each copy has a slice beside
    return model.expert_parameters * (weight_bytes + state_bytes)


def migration_prices(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> MigrationPrices:
    """Prices of one micro-batch of a layer, forward and backward, from the difference between twice the mean load on
    the busiest rank and the mean load, and of one expert's move over the widest link of its group."""
    pricer = StepPricer(model, cluster, workload)
    group = pricer.groups(layout).stages[0].experts

    def batch(load: float) -> MicroBatch:
        return MicroBatch(model, pricer.curves, layout.micro_batch, workload.sequence, workload.recipe, load)

    def experts_s(load: float) -> float:
        cost = compute.experts(batch(load), layout.ep, load)
        if layout.recomputed.activation or layout.recomputed.full:
            cost = cost.again(compute.activation_forward(batch(load), load))
        return cost.forward.seconds + cost.backward.seconds

    def exchange_s(load: float) -> float:
        found = dispatch_combine(batch(load), group, layout.all_to_all)
        return sum(each.forward.seconds + each.backward.seconds for each in (found.dispatch, found.combine))

    rows = batch(1.0).rows
    expert_row_s = max(0.0, experts_s(2.0) - experts_s(1.0)) / rows
    exchange_row_s = max(0.0, exchange_s(2.0) - exchange_s(1.0)) / rows
    levels: tuple[LevelPrice, ...] = ()
    algorithm = get_algorithm(dispatch_combine(batch(1.0), group, layout.all_to_all).selection.config.algorithm)
    per_node = int(group.within(NODE))
    if "node" in algorithm.domains and 1 < per_node < layout.ep:
        # Its rows between nodes go over all of a node's links: the node with the most of them sets the pace.
        domain_of_rank = tuple(rank // per_node for rank in range(layout.ep))
        levels = (LevelPrice(domain_of_rank, exchange_row_s / per_node, algorithm.dedup),)
        exchange_row_s = 0.0
    expert_bytes = moved_bytes(model, workload.recipe, copies=layout.dp, zero=layout.zero)
    pieces = max(1, round(expert_bytes / MESSAGE_BYTES))
    return MigrationPrices(
        ep=layout.ep,
        top_k=model.top_k,
        row_s=expert_row_s + exchange_row_s,
        expert_s=communication.p2p(pricer.curves, group.tier, expert_bytes / pieces).seconds * pieces,
        levels=levels,
    )
