"""Seconds of one step by pipeline rank and term, before the pipeline schedule is simulated."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar, cast

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.compute import MicroBatch
from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.dispatch import DispatchCombine, dispatch_combine
from piper_hpc.resource_model.eager.groups import Group, LayoutGroups, StageGroups, layout_groups
from piper_hpc.resource_model.eager.layer import (
    HOST_OPERATIONS_PER_MICRO_BATCH,
    ChunkCost,
    Work,
    dense_layer_cost,
    layer_cost,
    split_cost,
    work_beside_layers,
)
from piper_hpc.resource_model.eager.load import busiest_load
from piper_hpc.resource_model.eager.memory import chunk_parameters
from piper_hpc.resource_model.eager.pipeline import Held, chunk_links, held_chunks, run_schedule, split_micro_batches
from piper_hpc.resource_model.eager.update import UpdateCost, update_cost
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.rules import check_layout
from piper_hpc.spec import ClusterSpec, LayerKind, Layout, ModelSpec, Tier, Workload, executor
from piper_hpc.spec.schedules import SPLIT_BACKWARD, stage_of

Made = TypeVar("Made")


@dataclass(frozen=True)
class RankCost:
    """Seconds of one pipeline rank: of its chunks for one micro-batch, and once a step of its update, before which it
    waits for the ranks that it reduces gradients with."""

    chunks: tuple[ChunkCost, ...]
    update: UpdateCost
    reduce_wait: Cost

    def terms(self, micro_batches: int, split: Sequence[int]) -> dict[str, Cost]:
        """Busy time of the step by term. split: by chunk, see ChunkCost.terms."""
        step: dict[str, Cost] = {}
        parts = [chunk.terms(micro_batches, apart) for chunk, apart in zip(self.chunks, split, strict=True)]
        wait = {"grad_reduce_s": self.reduce_wait}
        for part in (*parts, wait, self.update.before_norm, self.update.after_norm):
            for term, cost in part.items():
                step[term] = step.get(term, Cost()) + cost
        return step

    def busy_s(self, micro_batches: int, split: Sequence[int]) -> float:
        """Busy seconds of the step. split: by chunk, see ChunkCost.terms."""
        once = self.before_norm_s + self.update.after_norm_s
        halves_s = sum(apart * chunk.split.backward.seconds for chunk, apart in zip(self.chunks, split, strict=True))
        return micro_batches * sum(chunk.forward_s + chunk.backward_s for chunk in self.chunks) + halves_s + once

    @property
    def before_norm_s(self) -> float:
        """Seconds between the last backward and the arrival at the norm."""
        return self.reduce_wait.seconds + self.update.before_norm_s


@dataclass(frozen=True)
class StepCost:
    """The costs of all pipeline ranks, of the messages over each boundary of global stages, and what the look-up of
    curves had to say; of each rank the expert group, with its dispatch and combine.

    copies: ranks of the job for each pipeline rank. All schedules that place the stages alike have the same costs.
    """

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
        return [self.ranks[rank].chunks[chunk] for rank, chunk in self._places]

    @property
    def backward_s(self) -> list[float]:
        """Seconds of a backward by global stage: the mean of those in whole and those in two halves."""
        return [
            self.ranks[rank].chunks[chunk].backward_s
            + self.ranks[rank].chunks[chunk].split.backward.seconds * self.split[rank][chunk] / self.micro_batches
            for rank, chunk in self._places
        ]

    @property
    def _places(self) -> list[tuple[int, int]]:
        """(rank, chunk) of every global stage."""
        pp, vpp = len(self.ranks), len(self.ranks[0].chunks)
        return sorted(
            ((rank, chunk) for rank in range(pp) for chunk in range(vpp)),
            key=lambda place: stage_of(self.schedule, place[0], place[1], pp),
        )

    @cached_property
    def split(self) -> tuple[tuple[int, ...], ...]:
        """For how many micro-batches of each chunk of a rank the backward comes in two halves, [pp][vpp]."""
        pp, vpp = len(self.ranks), len(self.ranks[0].chunks)
        return tuple(split_micro_batches(self.schedule, rank, pp, vpp, self.micro_batches) for rank in range(pp))

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Busy seconds by pipeline rank."""
        return tuple(rank.busy_s(self.micro_batches, split) for rank, split in zip(self.ranks, self.split, strict=True))

    @property
    def least_s(self) -> float:
        """Seconds that no step is shorter than, with a device for every rank.

        A rank begins once a micro-batch has come down to its first stage, and works through all of them. Where nothing
        is put off, the last thing that it does is the backward of its first stage, which then goes back up.
        """
        stages, whole = self.stages, self.schedule not in SPLIT_BACKWARD
        down = [0.0, *accumulate(stage.forward_s for stage in stages)]
        up = [0.0, *accumulate(stage.backward_s for stage in stages)]
        updated = self.ranks[0].before_norm_s  # by the rank of the first stage
        ends = []
        for index, rank in enumerate(self.ranks):
            # Of every schedule the first chunk of rank r is stage r.
            worked = down[index] + self.micro_batches * sum(chunk.forward_s + chunk.backward_s for chunk in rank.chunks)
            ends.append(worked + rank.before_norm_s)
            if whole:
                ends.append(worked + up[index] + updated)
        return max(ends) + max(rank.update.after_norm_s for rank in self.ranks)

    @property
    def critical_rank(self) -> int:
        """The busiest pipeline rank."""
        return self.busy_s.index(max(self.busy_s))

    @property
    def critical_terms(self) -> dict[str, Cost]:
        """Busy time of the critical rank by term."""
        rank = self.critical_rank
        return self.ranks[rank].terms(self.micro_batches, self.split[rank])


def step_cost(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> StepCost:
    """Costs in seconds of one step of `workload` under `layout`, from measured curves, counted operation by operation.

    Raises ResourceModelError for a layout or workload that does not train, or that the cluster has no ranks for.
    """
    problem = next(executor.missing_of_layout(layout, model), None)
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
        self._moe = next(kind for kind, _ in model.kinds(range(model.layers)) if kind.moe)
        self._known: dict[Hashable, Any] = {}

    def cost(self, layout: Layout) -> StepCost:
        """Costs of a layout that trains, breaks no rule and has its ranks; see step_cost."""
        groups = self.groups(layout)
        shared = {
            own: (self._reduce_wait(layout, own), self._exchange(layout, own.experts)) for own in set(groups.stages)
        }
        if any(own.experts.tier == Tier.SYSTEM.value for own in shared):
            self.curves.note(
                f"ep={layout.ep}: expert groups reach beyond one switch, against Eq 10; their all-to-all pays for it"
            )

        def of_rank(own: StageGroups, held: tuple[Held, ...], links: tuple[tuple[str, ...], ...]) -> RankCost:
            chunks = tuple(self._chunk(layout, own.experts, *each) for each in zip(held, links, strict=True))
            return RankCost(chunks, self._update(layout, own, groups.world, held), shared[own][0])

        links = chunk_links(layout.schedule, layout.pp, layout.vpp, groups.boundaries)
        ranks = list(zip(groups.stages, held_chunks(layout, self.model), links, strict=True))
        known = {rank: of_rank(*rank) for rank in set(ranks)}
        return StepCost(
            tuple(known[rank] for rank in ranks),
            run_schedule(layout),
            layout.micro_batches(self.workload.global_batch),
            tuple(Cost() if tier is None else self._message(layout, tier) for tier in groups.boundaries),
            self.curves,
            tuple((own.experts, shared[own][1]) for own in groups.stages),
            layout.ranks // layout.pp,
        )

    def groups(self, layout: Layout) -> LayoutGroups:
        """Groups of the layout's degrees."""
        key = (layout.pp, layout.vpp, layout.ep, layout.dp, layout.schedule)
        return self._once(("groups", key), lambda: layout_groups(layout, self.cluster))

    def chunk(self, layout: Layout, group: Group, held: Held) -> ChunkCost:
        """A stage on the ranks of an expert group, without what its messages cost."""
        return self._chunk(layout, group, held, ())

    def _chunk(self, layout: Layout, group: Group, held: Held, boundaries: tuple[str, ...]) -> ChunkCost:
        split = split_cost(self._batch(layout), held.layers, first=held.first)
        layers = tuple((self._layer(layout, group, kind), count) for kind, count in held.kinds)
        return ChunkCost(layers, self._beside(layout, held, boundaries), held.first, split)

    def _beside(self, layout: Layout, held: Held, boundaries: tuple[str, ...]) -> Work:
        first, last, pipelined = held.first, held.last, layout.stages > 1
        return self._once(
            ("beside", layout.micro_batch, first, last, pipelined, boundaries),
            lambda: work_beside_layers(
                self._batch(layout), first=first, last=last, pipelined=pipelined, boundaries=boundaries
            ),
        )

    def _update(self, layout: Layout, groups: StageGroups, world: Group, held: tuple[Held, ...]) -> UpdateCost:
        return self._once(
            ("update", layout.ep, layout.zero, groups, world, held),
            lambda: update_cost(
                self.curves,
                self.workload.recipe,
                [chunk_parameters(self.model, layout.ep, chunk) for chunk in held],
                sum(chunk.layers for chunk in held),
                groups,
                world,
                layout.zero,
            ),
        )

    def _reduce_wait(self, layout: Layout, groups: StageGroups) -> Cost:
        def make() -> Cost:
            return communication.arrival_skew(self.curves, groups.stage, self._since_met(layout, groups.experts))

        key = ("wait", layout.micro_batch, layout.recompute, layout.ep, layout.stages, layout.all_to_all, groups)
        return self._once(key, make)

    def _since_met(self, layout: Layout, experts: Group) -> Cost:
        """What a rank computes before gradients are reduced, since those of its stage met: in the last exchange of
        rows; without any, in the last message from another stage; without stages, where the step before ended."""
        layer = self._layer(layout, experts, self._moe).modules
        if experts.size > 1:
            return layer["router_s"].backward + layer["attention_s"].backward
        once = total(cost.backward for cost in layer.values())
        if layout.stages > 1:
            return once * (self.model.layers / layout.stages)
        once += total(cost.forward for cost in layer.values())
        return once * (self.model.layers * layout.micro_batches(self.workload.global_batch))

    def _layer(self, layout: Layout, group: Group, kind: LayerKind) -> Work:
        # Where ranks share cores, another takes the one of a rank that waits: nothing is gained by filling the wait.
        overlap = layout.overlap_shared and not self.cluster.devices_share_cores
        pipelined = layout.stages > 1
        chosen = layout.micro_batch, layout.recompute, layout.ep, layout.all_to_all
        key = ("layer", *chosen, group, kind, overlap, pipelined)

        def make() -> Work:
            batch = self._batch(layout)
            if not kind.moe:
                return dense_layer_cost(batch, layout.recomputed, kind, pipelined=pipelined)
            exchange, again = self._exchange(layout, group), layout.recomputed
            return layer_cost(
                batch, layout.ep, group, exchange, again, kind, overlap_shared=overlap, pipelined=pipelined
            )

        return self._once(key, make)

    def _exchange(self, layout: Layout, group: Group) -> DispatchCombine:
        return self._once(
            ("exchange", layout.micro_batch, layout.ep, group, layout.all_to_all),
            lambda: dispatch_combine(self._batch(layout), group, layout.all_to_all),
        )

    def _batch(self, layout: Layout) -> MicroBatch:
        def make() -> MicroBatch:
            workload, load = self.workload, busiest_load(self.model, layout, self.workload)
            return MicroBatch(self.model, self.curves, layout.micro_batch, workload.sequence, workload.recipe, load)

        return self._once(("batch", layout.micro_batch, layout.ep, layout.all_to_all), make)

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
