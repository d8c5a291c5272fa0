"""Seconds of one step by stage and term, before the pipeline schedule is simulated."""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.resource_model.eager import communication, compute
from piper_hpc.resource_model.eager.compute import MicroBatch, ModuleCost
from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.dispatch import DispatchCombine, dispatch_combine
from piper_hpc.resource_model.eager.groups import Group, LayoutGroups, layout_groups
from piper_hpc.resource_model.eager.memory import stage_parameter_parts
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.rules import check_layout
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Tier, Workload, executor

NORM_BYTES = 8
"""The squared norm of all gradients is one float64."""

HOST_OPERATIONS_PER_MICRO_BATCH = 120
"""Python of torch's 1F1B per micro-batch, in eager operations: 0.5 ms where one takes 4 us, measured once on a CPU."""

HOST_OPERATIONS_PER_STEP = 150
"""Batch preparation, zeroing of gradients and the learning rate, in eager operations: 0.6 ms on the same CPU."""

HOST_OPERATIONS_PER_LAYER = 2
"""The router's sums, set to zero before a step."""


@dataclass(frozen=True)
class StageCost:
    """Seconds of one rank of a stage, by term.

    modules: of one micro-batch; before_norm: once a step, from the last backward to the all-reduce of the gradient norm
    that all ranks clip by; after_norm: from that all-reduce to the end of the step.
    """

    modules: dict[str, ModuleCost]
    before_norm: dict[str, Cost]
    after_norm: dict[str, Cost]

    @property
    def forward_s(self) -> float:
        """Seconds of one forward."""
        return sum(cost.forward.seconds for cost in self.modules.values())

    @property
    def backward_s(self) -> float:
        """Seconds of one backward."""
        return sum(cost.backward.seconds for cost in self.modules.values())

    def terms(self, micro_batches: int) -> dict[str, Cost]:
        """Busy time of the step by term."""
        step = {term: (cost.forward + cost.backward) * micro_batches for term, cost in self.modules.items()}
        for once in (self.before_norm, self.after_norm):
            for term, cost in once.items():
                step[term] = step.get(term, Cost()) + cost
        return step

    @property
    def before_norm_s(self) -> float:
        """Seconds between the last backward and the arrival at the norm."""
        return sum(cost.seconds for cost in self.before_norm.values())

    @property
    def after_norm_s(self) -> float:
        """Seconds from the last rank's arrival at the norm to the end of the step."""
        return sum(cost.seconds for cost in self.after_norm.values())

    def busy_s(self, micro_batches: int) -> float:
        """Busy seconds of the step."""
        return micro_batches * (self.forward_s + self.backward_s) + self.before_norm_s + self.after_norm_s


@dataclass(frozen=True)
class StepCost:
    """The costs of all stages, of the messages between them, and what the look-up of curves had to say; of each stage
    the expert group, with its dispatch and combine."""

    stages: tuple[StageCost, ...]
    schedule: str
    micro_batches: int
    messages: tuple[Cost, ...]
    curves: Curves
    all_to_alls: tuple[tuple[Group, DispatchCombine], ...]

    @property
    def critical_stage(self) -> int:
        """The busiest stage."""
        busy = [stage.busy_s(self.micro_batches) for stage in self.stages]
        return busy.index(max(busy))

    @property
    def busy_s(self) -> float:
        """Busy seconds of the busiest stage: no step of this layout is shorter."""
        return max(stage.busy_s(self.micro_batches) for stage in self.stages)


def step_cost(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> StepCost:
    """Costs in seconds of one step of `workload` under `layout`, from measured curves, counted operation by operation.

    Raises ResourceModelError for a layout or workload that does not train, or that the cluster has no ranks for.
    """
    problem = next(executor.missing_of_layout(layout), None)
    if problem is not None:
        raise ResourceModelError(str(problem))
    check_layout(model, cluster, layout, workload)
    micro_batches = layout.micro_batches(workload.global_batch)
    curves = Curves(cluster, workload.bytes_per_value)
    load = float(workload.routing.load(layout.ep))
    batch = MicroBatch(model, curves, layout.micro_batch, workload.sequence, workload.bytes_per_value, load)
    groups = layout_groups(layout, cluster)
    if any(of_stage.experts.tier == Tier.SYSTEM.value for of_stage in groups.stages):
        curves.note(
            f"ep={layout.ep}: expert groups reach beyond one switch, against Eq 10; their all-to-all pays for it"
        )
    of_group = {stage.experts: dispatch_combine(batch, stage.experts, layout.all_to_all) for stage in groups.stages}
    layers = {experts: _layer(batch, layout, experts, costs) for experts, costs in of_group.items()}
    stages = tuple(
        _stage(batch, layout, groups, stage, layers[of_stage.experts]) for stage, of_stage in enumerate(groups.stages)
    )
    message_bytes = batch.tokens * model.hidden * workload.bytes_per_value
    # Having posted a message, torch's 1F1B does some Python and then waits for its neighbour itself.
    schedule = batch.host(HOST_OPERATIONS_PER_MICRO_BATCH).forward
    messages = tuple(communication.message(curves, tier, message_bytes, schedule) for tier in groups.boundaries)
    all_to_alls = tuple((stage.experts, of_group[stage.experts]) for stage in groups.stages)
    return StepCost(stages, layout.schedule, micro_batches, messages, curves, all_to_alls)


def _layer(batch: MicroBatch, layout: Layout, group: Group, costs: DispatchCombine) -> dict[str, ModuleCost]:
    """Seconds of one layer by term, on the mean rank. Five all-to-alls synchronise its expert group, each with a wait.

    Between combine and the next dispatch lies attention's and the router's compute, between dispatch and combine the
    experts', both ways; in forward, between the all-to-alls of counts and of rows, what a dispatch computes by itself.
    At each of them ranks wait for arrival skew, which grows with that compute (communication.arrival_skew), and where
    experts come before it, for the rank with the most rows.
    """
    curves = batch.curves
    attention, router, experts = compute.attention(batch), compute.router(batch), compute.experts(batch, layout.ep)
    dense, rows = attention + router, compute.dispatch(batch, Group())
    imbalance = compute.experts(batch, layout.ep, batch.load) + experts * -1

    def arrival_waits(before_forward: Cost, before_backward: Cost) -> ModuleCost:
        return ModuleCost(
            communication.arrival_skew(curves, group, before_forward),
            communication.arrival_skew(curves, group, before_backward),
        )

    return {
        "attention_s": attention,
        "router_s": router,
        "dispatch_s": costs.dispatch
        + arrival_waits(dense.forward, experts.backward)
        + arrival_waits(rows.forward, Cost())
        + ModuleCost(Cost(), imbalance.backward),
        "expert_s": experts,
        "combine_s": costs.combine
        + arrival_waits(experts.forward, dense.backward)
        + ModuleCost(imbalance.forward, Cost()),
        "other_s": compute.autograd_overhead(batch),
    }


def _stage(
    batch: MicroBatch, layout: Layout, groups: LayoutGroups, stage: int, layer: dict[str, ModuleCost]
) -> StageCost:
    curves, of_stage = batch.curves, groups.stages[stage]
    layers = len(layout.layers_by_stage(batch.model.layers)[stage])
    dense, expert = stage_parameter_parts(batch.model, layout)[stage]
    parameters = dense + expert
    modules = {term: cost * layers for term, cost in layer.items()}
    ends = [compute.embedding(batch)] * (stage == 0) + [compute.head(batch)] * (stage == layout.pp - 1)
    if ends:
        modules["head_s"] = compute.sum_modules(*ends)
    modules["host_s"] = batch.host(HOST_OPERATIONS_PER_MICRO_BATCH if layout.pp > 1 else 0)
    host = curves.launches(HOST_OPERATIONS_PER_STEP + HOST_OPERATIONS_PER_LAYER * layers)
    replicas = [
        communication.all_reduce(curves, group, count * batch.bytes_per_value)
        for group, count in ((of_stage.stage, dense), (of_stage.replicas, expert))
    ]
    last_chunk = layer["router_s"].backward + layer["attention_s"].backward
    norm, clip = batch.stream((parameters, 1)), batch.stream((2 * parameters, 1))
    return StageCost(
        modules,
        before_norm={
            "host_s": host + batch.stream((parameters, 1)),
            "grad_reduce_s": total(replicas) + communication.arrival_skew(curves, of_stage.stage, last_chunk),
            "optimizer_s": norm,
        },
        after_norm={
            "grad_reduce_s": communication.all_reduce(curves, groups.world, NORM_BYTES),
            "optimizer_s": clip + curves.operation("adamw", parameters),
        },
    )
