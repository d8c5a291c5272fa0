"""What one step costs every stage: seconds by term, before the pipeline puts them on a timeline."""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.resource_model import communication, compute
from piper_hpc.resource_model.compute import MicroBatch, ModuleCost
from piper_hpc.resource_model.cost import Cost, total
from piper_hpc.resource_model.curves import Curves
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.groups import Group, LayoutGroups, layout_groups
from piper_hpc.resource_model.memory import stage_parameter_parts
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Workload

HOST_OPERATIONS_PER_MICRO_BATCH = 12
"""Eager operations outside the modules for one micro-batch: slices of the batch, the loss, and message buffers."""

HOST_OPERATIONS_PER_TENSOR = 1
"""Dropping one parameter's gradient before the step."""

TENSORS_PER_LAYER = 10
"""Two norms, four projections, the gate and three expert matrices."""


@dataclass(frozen=True)
class StageCost:
    """Seconds of one rank of a stage: `modules` for one micro-batch by term, `once` for the whole step by term."""

    modules: dict[str, ModuleCost]
    once: dict[str, Cost]

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
        for term, cost in self.once.items():
            step[term] = step.get(term, Cost()) + cost
        return step

    def busy_s(self, micro_batches: int) -> float:
        """Busy seconds of the step."""
        return micro_batches * (self.forward_s + self.backward_s) + sum(cost.seconds for cost in self.once.values())


@dataclass(frozen=True)
class StepCost:
    """The costs of all stages, of the messages between them, and what the look-up of curves had to say."""

    stages: tuple[StageCost, ...]
    micro_batches: int
    messages: tuple[Cost, ...]
    curves: Curves

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
    """Costs of one step of `workload` under `layout`; ResourceModelError where the layout has no such step."""
    _check(model, cluster, layout, workload)
    micro_batches = layout.micro_batches(workload.global_batch)
    curves = Curves(cluster, workload.bytes_per_value)
    batch = MicroBatch(model, curves, layout.micro_batch, workload.sequence, workload.bytes_per_value)
    groups = layout_groups(layout, cluster)
    layers = {group: _layer(batch, group.experts) for group in set(groups.stages)}
    stages = tuple(
        StageCost(
            _modules(batch, layers[groups.stages[stage]], len(owned), first=stage == 0, last=stage == layout.pp - 1),
            _once(batch, layout, groups, stage, len(owned)),
        )
        for stage, owned in enumerate(layout.stage_layers(model.layers))
    )
    message_bytes = batch.tokens * model.hidden * workload.bytes_per_value
    messages = tuple(communication.p2p(curves, tier, message_bytes) for tier in groups.boundaries)
    return StepCost(stages, micro_batches, messages, curves)


def _layer(batch: MicroBatch, experts: Group) -> dict[str, ModuleCost]:
    return {
        "attention_s": compute.attention(batch),
        "router_s": compute.router(batch),
        "dispatch_s": compute.dispatch(batch, experts),
        "expert_s": compute.experts(batch),
        "combine_s": compute.combine(batch, experts),
    }


def _modules(
    batch: MicroBatch, layer: dict[str, ModuleCost], layers: int, *, first: bool, last: bool
) -> dict[str, ModuleCost]:
    modules = {term: cost * layers for term, cost in layer.items()}
    ends = [compute.embedding(batch)] * first + [compute.head(batch)] * last
    if ends:
        modules["head_s"] = sum(ends[1:], ends[0])
    modules["host_s"] = ModuleCost(batch.curves.operation("host_op", HOST_OPERATIONS_PER_MICRO_BATCH), Cost())
    return modules


def _once(batch: MicroBatch, layout: Layout, groups: LayoutGroups, stage: int, layers: int) -> dict[str, Cost]:
    """Gradient reduction, the norm for clipping, the optimizer, and dropping gradients."""
    curves, of_stage = batch.curves, groups.stages[stage]
    dense, expert = stage_parameter_parts(batch.model, layout)[stage]
    reduction = [
        communication.all_reduce(curves, of_stage.stage, dense * batch.bytes_per_value),
        communication.all_reduce(curves, of_stage.replicas, expert * batch.bytes_per_value),
        communication.all_reduce(curves, groups.world, batch.bytes_per_value),
    ]
    return {
        "grad_reduce_s": total(reduction),
        "optimizer_s": curves.operation("adamw", dense + expert) + batch.stream(3 * (dense + expert)),
        "host_s": curves.operation("host_op", HOST_OPERATIONS_PER_TENSOR * TENSORS_PER_LAYER * layers),
    }


def _check(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> None:
    """What must hold before anything can be counted."""
    share = layout.micro_batch * layout.dense_dp
    problems = {
        f"layout: pp * dp * ep * etp = {layout.ranks} ranks, cluster '{cluster.name}' has {cluster.ranks}": (
            layout.ranks > cluster.ranks
        ),
        f"layout.ep={layout.ep} must divide model.experts={model.experts}": bool(model.experts % layout.ep),
        f"layout.pp={layout.pp} must not exceed model.layers={model.layers}": layout.pp > model.layers,
        f"workload.global_batch={workload.global_batch} must be a multiple of micro_batch * dense_dp = {share}": bool(
            workload.global_batch % share
        ),
        f"layout.schedule='{layout.schedule}' is not modelled; use '1f1b'": layout.schedule != "1f1b",
        f"layout.recompute='{layout.recompute}' is not modelled; use 'none'": layout.recompute != "none",
        f"layout.all_to_all='{layout.all_to_all}' is not modelled; use 'flat'": layout.all_to_all != "flat",
        "layout: vpp, etp, tp, cp above 1 and zero above 0 are not modelled; set them to 1 and 0": (
            (layout.vpp, layout.etp, layout.tp, layout.cp, layout.zero) != (1, 1, 1, 1, 0)
        ),
    }
    for message, wrong in problems.items():
        if wrong:
            raise ResourceModelError(message)
