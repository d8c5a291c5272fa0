"""Seconds of one step by pipeline rank and term, before the pipeline schedule is simulated."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar, cast

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.compute import MicroBatch
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.dispatch import DispatchCombine, dispatch_combine
from piper_hpc.resource_model.eager.groups import Group, LayoutGroups, StageGroups, layout_groups
from piper_hpc.resource_model.eager.layer import (
    HOST_OPERATIONS_PER_MICRO_BATCH,
    ChunkCost,
    Modules,
    chunk_cost,
    layer_cost,
)
from piper_hpc.resource_model.eager.memory import chunk_parameters
from piper_hpc.resource_model.eager.pipeline import Held, held_chunks, run_schedule, split_micro_batches
from piper_hpc.resource_model.eager.update import UpdateCost, update_cost
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.rules import check_layout
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Tier, Workload, executor
from piper_hpc.spec.schedules import stage_of

Made = TypeVar("Made")


@dataclass(frozen=True)
class RankCost:
    """Seconds of one pipeline rank: of its chunks for one micro-batch, and once a step. split: see ChunkCost.terms."""

    chunks: tuple[ChunkCost, ...]
    split: tuple[int, ...]
    update: UpdateCost

    def terms(self, micro_batches: int) -> dict[str, Cost]:
        """Busy time of the step by term."""
        step: dict[str, Cost] = {}
        parts = [chunk.terms(micro_batches, split) for chunk, split in zip(self.chunks, self.split, strict=True)]
        for part in (*parts, self.update.before_norm, self.update.after_norm):
            for term, cost in part.items():
                step[term] = step.get(term, Cost()) + cost
        return step

    def busy_s(self, micro_batches: int) -> float:
        """Busy seconds of the step."""
        once = self.update.before_norm_s + self.update.after_norm_s
        return micro_batches * sum(chunk.forward_s + chunk.backward_s for chunk in self.chunks) + once


@dataclass(frozen=True)
class StepCost:
    """The costs of all pipeline ranks, of the messages over each boundary of global stages, and what the look-up of
    curves had to say; of each rank the expert group, with its dispatch and combine. copies: ranks of the job for each
    pipeline rank."""

    ranks: tuple[RankCost, ...]
    schedule: str
    micro_batches: int
    messages: tuple[Cost, ...]
    curves: Curves
    all_to_alls: tuple[tuple[Group, DispatchCombine], ...]
    copies: int

    @property
    def stages(self) -> list[ChunkCost]:
        """The chunks in the order of the model: by global stage."""
        pp, vpp = len(self.ranks), len(self.ranks[0].chunks)
        of_stage = {
            stage_of(self.schedule, rank, chunk, pp): self.ranks[rank].chunks[chunk]
            for rank in range(pp)
            for chunk in range(vpp)
        }
        return [of_stage[stage] for stage in range(pp * vpp)]

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Busy seconds by pipeline rank: no step of this layout is shorter than the longest."""
        return tuple(rank.busy_s(self.micro_batches) for rank in self.ranks)

    @property
    def critical_rank(self) -> int:
        """The busiest pipeline rank."""
        return self.busy_s.index(max(self.busy_s))


def step_cost(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> StepCost:
    """Costs in seconds of one step of `workload` under `layout`, from measured curves, counted operation by operation.

    Raises ResourceModelError for a layout or workload that does not train, or that the cluster has no ranks for.
    """
    problem = next(executor.missing_of_layout(layout), None)
    if problem is not None:
        raise ResourceModelError(str(problem))
    check_layout(model, cluster, layout, workload)
    return StepPricer(model, cluster, workload).cost(layout)


class StepPricer:
    """Prices steps of one model, cluster and workload, and remembers the parts that layouts share.

    What curves had to say is that of all layouts so far: exact for one layout, of no use to a search.
    """

    def __init__(self, model: ModelSpec, cluster: ClusterSpec, workload: Workload) -> None:
        self.model, self.cluster, self.workload = model, cluster, workload
        self.curves = Curves(cluster, workload.bytes_per_value)
        self._known: dict[Hashable, Any] = {}

    def cost(self, layout: Layout) -> StepCost:
        """Costs of a layout that trains, breaks no rule and has its ranks; see step_cost."""
        groups = self.groups(layout)
        if any(of_rank.experts.tier == Tier.SYSTEM.value for of_rank in groups.stages):
            self.curves.note(
                f"ep={layout.ep}: expert groups reach beyond one switch, against Eq 10; their all-to-all pays for it"
            )
        by_rank = zip(groups.stages, held_chunks(layout, self.model.layers), strict=True)
        return StepCost(
            tuple(self._rank(layout, own, groups.world, rank, held) for rank, (own, held) in enumerate(by_rank)),
            run_schedule(layout),
            layout.micro_batches(self.workload.global_batch),
            tuple(Cost() if tier is None else self._message(layout, tier) for tier in groups.boundaries),
            self.curves,
            tuple((of_rank.experts, self._exchange(layout, of_rank.experts)) for of_rank in groups.stages),
            layout.ranks // layout.pp,
        )

    def groups(self, layout: Layout) -> LayoutGroups:
        """Groups of the layout's degrees."""
        key = (layout.pp, layout.vpp, layout.ep, layout.dp, layout.schedule)
        return self._once(("groups", key), lambda: layout_groups(layout, self.cluster))

    def chunk(self, layout: Layout, group: Group, held: Held) -> ChunkCost:
        """A stage on the ranks of an expert group."""
        pipelined = layout.stages > 1
        key = (layout.micro_batch, layout.recompute, layout.ep, group, layout.all_to_all, held, pipelined)
        return self._once(
            ("chunk", key),
            lambda: chunk_cost(self._batch(layout), self._layer(layout, group), held, pipelined=pipelined),
        )

    def _rank(self, layout: Layout, groups: StageGroups, world: Group, rank: int, held: tuple[Held, ...]) -> RankCost:
        schedule, micro_batches = run_schedule(layout), layout.micro_batches(self.workload.global_batch)
        return RankCost(
            tuple(self.chunk(layout, groups.experts, chunk) for chunk in held),
            split_micro_batches(schedule, rank, layout.pp, layout.vpp, micro_batches),
            self._update(layout, groups, world, held),
        )

    def _update(self, layout: Layout, groups: StageGroups, world: Group, held: tuple[Held, ...]) -> UpdateCost:
        key = (layout.micro_batch, layout.recompute, layout.ep, layout.zero, layout.all_to_all, groups, world, held)

        def make() -> UpdateCost:
            layer = self._layer(layout, groups.experts)
            return update_cost(
                self._batch(layout),
                [chunk_parameters(self.model, layout.ep, chunk) for chunk in held],
                sum(chunk.layers for chunk in held),
                groups,
                world,
                layout.zero,
                layer["router_s"].backward + layer["attention_s"].backward,
            )

        return self._once(("update", key), make)

    def _layer(self, layout: Layout, group: Group) -> Modules:
        exchange = self._exchange(layout, group)
        return self._once(
            ("layer", layout.micro_batch, layout.recompute, layout.ep, group, layout.all_to_all),
            lambda: layer_cost(self._batch(layout), layout.ep, group, exchange, layout.recomputed),
        )

    def _exchange(self, layout: Layout, group: Group) -> DispatchCombine:
        return self._once(
            ("exchange", layout.micro_batch, layout.ep, group, layout.all_to_all),
            lambda: dispatch_combine(self._batch(layout), group, layout.all_to_all),
        )

    def _batch(self, layout: Layout) -> MicroBatch:
        workload, load = self.workload, float(self.workload.routing.load(layout.ep))
        return MicroBatch(self.model, self.curves, layout.micro_batch, workload.sequence, workload.recipe, load)

    def _message(self, layout: Layout, tier: str) -> Cost:
        """A message between stages. Having posted it, torch's pipeline does some Python and then waits itself."""
        batch = self._batch(layout)

        def make() -> Cost:
            python = batch.host(HOST_OPERATIONS_PER_MICRO_BATCH).forward
            return communication.message(self.curves, tier, batch.hidden * batch.bytes_per_value, python)

        return self._once(("message", layout.micro_batch, tier), make)

    def _once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        if key not in self._known:
            self._known[key] = make()
        return cast(Made, self._known[key])
