"""One step under fused kernels, in closed form: every term, every stage's memory, for one layout or a grid of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from piper_hpc.resource_model import collectives, schedule
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.fused import compute, exchange, memory
from piper_hpc.resource_model.fused.device import Device, Times
from piper_hpc.resource_model.fused.exchange import Network, beside
from piper_hpc.resource_model.fused.host import launches
from piper_hpc.resource_model.fused.shapes import Shapes
from piper_hpc.resource_model.fused.stages import Chunk, Kind, chunks
from piper_hpc.resource_model.numbers import Number
from piper_hpc.resource_model.topology import axis_groups, boundary_tier, tier_links, topology_of
from piper_hpc.spec import ClusterSpec, Degrees, Execution, Link, ModelSpec, Workload

Modules = dict[str, Times]
"""Term -> seconds of one micro-batch."""


@dataclass(frozen=True)
class Step:
    """What `evaluate` finds. Arrays have the shape that the layout's fields broadcast to.

    terms: exposed seconds of the busiest rank's step, they add up to step_time_s; hidden: seconds beside compute;
    memory: kind -> bytes by pipeline rank; ranks: seconds of one micro-batch by pipeline rank and chunk.
    """

    terms: dict[str, Number]
    hidden: dict[str, Number]
    memory: dict[str, list[Number]]
    ranks: tuple[tuple[Times, ...], ...]
    message_s: Number
    micro_batches: Number

    @property
    def step_time_s(self) -> Number:
        """Seconds of the step."""
        return sum(self.terms.values())

    @property
    def peak_bytes(self) -> Number:
        """Bytes of the fullest rank."""
        by_rank = [sum(kinds) for kinds in zip(*self.memory.values(), strict=True)]
        return reduce(np.maximum, by_rank)


def stepper(
    model: ModelSpec, cluster: ClusterSpec, layout: Degrees, workload: Workload, execution: Execution
) -> Stepper:
    """The step of `layout` on `cluster`; ResourceModelError where nothing is known of its device or its links.

    A link of the data sheet counts with the share of it that the device's efficiency says collectives reach.
    """
    accelerator = cluster.accelerator
    if accelerator is None:
        raise ResourceModelError(
            f"cluster '{cluster.name}' names no accelerator, so kernels have no price; give cluster.accelerator, "
            "for example cluster.accelerator=h100, or predict for executor=piper with measured curves"
        )
    links = {
        tier: Link(link.latency_s, link.bytes_per_s * accelerator.efficiency.link_share(tier))
        for tier, link in cluster.links.items()
    }
    topology = topology_of(cluster)
    stage_ranks = layout.ep * layout.etp * layout.dp
    boundaries = [boundary_tier(topology, stage_ranks, stage) for stage in range(layout.pp - 1)]
    return Stepper(
        Shapes(model, layout, workload, execution.sequence_parallel),
        Device(accelerator, workload.recipe),
        Network(
            axis_groups(layout, topology),
            tier_links(links, name=cluster.name, tiers=topology.tiers),
            reduce(np.maximum, boundaries, 0),
        ),
        execution,
    )


@dataclass(frozen=True)
class Stepper:
    """The step of one layout, or of a grid of layouts that share pp, vpp and schedule."""

    shapes: Shapes
    device: Device
    network: Network
    execution: Execution

    def evaluate(self) -> Step:
        """Every term and every stage's memory."""
        layout = self.shapes.layout
        pp, vpp = layout.pp, layout.vpp
        micro_batches = self.shapes.workload.global_batch / (layout.micro_batch * layout.dense_dp)
        of_rank = [tuple(self._total(self._chunk(chunk)) for chunk in of_rank) for of_rank in self.chunks]
        work = [sum(parts, Times()) for parts in of_rank]
        totals = [times.forward + times.backward for times in work]
        busy, mean = reduce(np.maximum, totals), sum(totals)
        terms = self._busy_terms(totals, busy, micro_batches)

        critical = self._select(totals, busy, work)
        rest = reduce(Times.__add__, work) + critical * -1.0
        as_work = [schedule.Work(times.forward, times.input, times.weight) for times in (critical, rest)]
        terms["bubble_s"] = schedule.bubble_s(layout.schedule, pp, vpp, *as_work, micro_batches=micro_batches) if pp > 1 else 0.0 * mean
        message_s = self._message_s
        waits = schedule.exposed_messages(
            layout.schedule, pp, vpp, micro_batches, blocking=not self.execution.overlap_p2p
        )
        terms["p2p_s"] = waits * message_s
        reduced, hidden = self._grad_reduce(critical)
        terms["grad_reduce_s"] = reduced * np.where(np.asarray(layout.zero) >= 3, micro_batches, 1.0)
        terms["optimizer_s"] = self._optimizer()
        terms["other_s"] = self.device.accelerator.efficiency.step_host_s + 0.0 * busy
        return Step(
            terms, {"grad_reduce_s": hidden}, self._memory(micro_batches), tuple(of_rank), message_s, micro_batches
        )

    @cached_property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of every pipeline rank."""
        layout = self.shapes.layout
        return chunks(self.shapes.model, layout.schedule, layout.pp, layout.vpp)

    # Time.

    def _layer(self, kind: Kind) -> Modules:
        shapes, device, execution = self.shapes, self.device, self.execution
        recompute = shapes.layout.recomputed
        core = compute.scores(device, shapes, execution, kind.window)
        attention = compute.attention(device, shapes, execution, kind.window)
        attention += exchange.tensor(shapes, self.network, execution, attention)
        attention += exchange.context(shapes, self.network, core)
        modules = {"attention_s": attention}
        if kind.moe:
            permutation = compute.permutation(device, shapes) * 0.5
            moved_s = exchange.experts(device, shapes, self.network, shapes.layout.all_to_all)
            shared = compute.shared(device, shapes)
            if shapes.model.dense_width:
                shared += exchange.tensor(shapes, self.network, execution, shared)
            moe = {
                "router_s": compute.router(device, shapes),
                "dispatch_s": permutation + Times(moved_s, moved_s),
                "expert_s": compute.experts(device, shapes) + shared,
                "combine_s": permutation + Times(moved_s, moved_s) + compute.residual(device, shapes, execution),
            }
            modules |= {term: times.recomputed(recompute.moe * (1 - recompute.full)) for term, times in moe.items()}
        else:
            dense = compute.dense(device, shapes, execution)
            modules["expert_s"] = dense + exchange.tensor(shapes, self.network, execution, dense)
        launch_s = device.accelerator.efficiency.launch_s
        modules["host_s"] = launches(shapes, execution, moe=kind.moe) * launch_s
        return {term: times.recomputed(recompute.full) for term, times in modules.items()}

    @cached_property
    def _layers(self) -> dict[Kind, Modules]:
        return {kind: self._layer(kind) for of_rank in self.chunks for chunk in of_rank for kind, _ in chunk.layers}

    @cached_property
    def _head(self) -> Times:
        shapes, device = self.shapes, self.device
        head = compute.head(device, shapes, self.execution)
        return head + exchange.tensor(shapes, self.network, self.execution, head)

    def _chunk(self, chunk: Chunk) -> Modules:
        parts = [(modules, count) for kind, count in chunk.layers for modules in (self._layers[kind],)]
        total = _sum_modules(parts)
        ends = Times()
        if chunk.first:
            ends += compute.embedding(self.device, self.shapes)
        if chunk.last:
            ends += self._head * (1 + self.shapes.model.mtp_layers)
            total = _sum_modules([(total, 1.0), *self._mtp()])
        return total | ({"head_s": ends} if chunk.first or chunk.last else {})

    def _mtp(self) -> Iterable[tuple[Modules, float]]:
        """Multi-token prediction: each module a projection of two hidden states to one, and a layer (arXiv 2412.19437)."""
        model = self.shapes.model
        if model.mtp_layers:
            join = self.device.linear(self.shapes.local_tokens, 2 * model.hidden, model.hidden)
            yield {"expert_s": join}, float(model.mtp_layers)
            yield self._layers[Kind(model.is_moe(model.layers - 1), model.window(model.layers - 1))], model.mtp_layers

    def _total(self, modules: Modules) -> Times:
        return reduce(Times.__add__, modules.values(), Times())

    def _busy_terms(self, totals: list[Number], busy: Number, micro_batches: Number) -> dict[str, Number]:
        """Terms of the busiest rank; in a grid it may be another rank in every layout."""
        names = dict.fromkeys(term for kind in self._layers.values() for term in kind) | {"head_s": None}
        of_rank = [_sum_modules([(self._chunk(chunk), 1.0) for chunk in of_rank]) for of_rank in self.chunks]
        return {
            name: micro_batches
            * self._select(totals, busy, [modules.get(name, Times()) for modules in of_rank], whole=True)
            for name in names
        }

    def _select(
        self, totals: list[Number], busy: Number, values: list[Times], *, whole: bool = False
    ) -> Times | Number:
        """The entry of the first rank that is as busy as the busiest."""
        masks = [np.asarray(total == busy) for total in totals]

        def pick(field: list[Number]) -> Number:
            chosen = np.select(
                masks, [np.broadcast_to(np.asarray(value, dtype=float), np.shape(busy)) for value in field]
            )
            return chosen if chosen.ndim else float(chosen)

        if whole:
            return pick([times.forward + times.backward for times in values])
        return Times(*(pick([getattr(times, name) for times in values]) for name in ("forward", "input", "weight")))

    @cached_property
    def _message_s(self) -> Number:
        message = exchange.message_bytes(self.shapes)
        return self.network.send_s(self.network.boundary_tier, message) * (self.shapes.layout.pp > 1)

    def _grad_reduce(self, critical: Times) -> tuple[Number, Number]:
        """Exposed and hidden seconds of making replicas equal: once a step, or for every micro-batch with ZeRO 3.

        All-reduce without ZeRO; with it gradients are scattered and weights gathered, beside the last backward and the
        first forward where the framework overlaps them.
        """
        shapes, groups, links = self.shapes, self.network.groups, self.network.links
        zero = np.asarray(shapes.layout.zero)
        recipe = shapes.workload.recipe
        parameters = self._largest_parameters
        scattered: Number = 0.0
        gathered: Number = 0.0
        for group, count in ((groups.dense, parameters.dense), (groups.replicas, parameters.experts)):
            gradient_bytes, weight_bytes = count * recipe.gradient_bytes, count * recipe.weight_bytes
            scatter = collectives.reduce_scatter_s(group, links, gradient_bytes)
            whole = collectives.all_reduce_s(group, links, gradient_bytes)
            scattered = scattered + np.where(zero >= 1, scatter, whole)
            gathered = gathered + np.where(zero >= 1, collectives.all_gather_s(group, links, weight_bytes), 0.0)
        again = np.where(zero >= 3, gathered, 0.0)
        if not self.execution.overlap_grads:
            return scattered + gathered + again, 0.0 * scattered
        exposed = beside(gathered, critical.forward) + beside(scattered + again, critical.backward)
        return exposed, scattered + gathered + again - exposed

    def _optimizer(self) -> Number:
        """AdamW reads gradients and states and writes states and weights; gradients are cleared, and read for the norm."""
        recipe = self.shapes.workload.recipe
        states = recipe.master_bytes + recipe.moment_bytes
        kept = memory.state_bytes(self.shapes, self._largest_parameters)
        shards = kept["optimizer"] / states
        passes = 2 if self.execution.fused_optimizer else 7
        update = shards * (passes * recipe.gradient_bytes + 2 * states + recipe.weight_bytes)
        return self.device.stream_s(update + kept["gradients"])

    # Memory.

    @cached_property
    def _parameters(self) -> list[memory.Parameters]:
        of_kind = {moe: memory.layer_parameters(self.shapes, moe=moe) for moe in {kind.moe for kind in self._layers}}
        return [
            reduce(
                memory.Parameters.__add__,
                [
                    memory.end_parameters(self.shapes, first=chunk.first, last=chunk.last)
                    + reduce(memory.Parameters.__add__, [of_kind[kind.moe] * count for kind, count in chunk.layers])
                    for chunk in of_rank
                ],
            )
            for of_rank in self.chunks
        ]

    @cached_property
    def _largest_parameters(self) -> memory.Parameters:
        return memory.Parameters(
            reduce(np.maximum, [parameters.dense for parameters in self._parameters]),
            reduce(np.maximum, [parameters.experts for parameters in self._parameters]),
        )

    def _memory(self, micro_batches: Number) -> dict[str, list[Number]]:
        """Bytes by kind and pipeline rank."""
        shapes, execution, layout = self.shapes, self.execution, self.shapes.layout
        kept = {moe: memory.layer_bytes(shapes, execution, moe=moe) for moe in {kind.moe for kind in self._layers}}
        back = {moe: memory.backward_bytes(shapes, execution, moe=moe) for moe in kept}
        head = memory.head_bytes(shapes, execution)
        table = shapes.model.embedding_parameters / layout.tp * shapes.value_bytes * execution.transformer_engine
        by_rank = []
        for rank, of_rank in enumerate(self.chunks):
            alive = schedule.in_flight_by_chunk(layout.schedule, rank, layout.pp, layout.vpp, micro_batches)
            activations = sum(
                count * sum(number * kept[kind.moe] for kind, number in chunk.layers)
                for count, chunk in zip(alive, of_rank, strict=True)
            )
            present = {kind.moe for chunk in of_rank for kind, _ in chunk.layers}
            last_kind = of_rank[-1].layers[-1][0].moe
            loss = any(chunk.last for chunk in of_rank) * (head + table)
            by_rank.append(
                memory.state_bytes(shapes, self._parameters[rank])
                | {
                    "activations": activations,
                    "workspace": np.maximum(back[last_kind], loss),
                    "weight_gradients": memory.weight_gradient_bytes(
                        shapes, execution, dense=False in present, moe=True in present
                    ),
                    "messages": 2.0 * exchange.message_bytes(shapes) * (layout.pp > 1),
                }
            )
        return {kind: [of_rank[kind] for of_rank in by_rank] for kind in by_rank[0]}


def _sum_modules(parts: Iterable[tuple[Modules, float]]) -> Modules:
    total: Modules = {}
    for modules, count in parts:
        for term, times in modules.items():
            total[term] = total.get(term, Times()) + times * count
    return total
