"""One step under fused kernels, in closed form: every term, every stage's memory, for one layout or a grid of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np

from piper_hpc.resource_model import collectives, schedule
from piper_hpc.resource_model.analytical import communication, memory
from piper_hpc.resource_model.analytical.blocks import Blocks, Counts, PlacedBlocks, weighted, weighted_times
from piper_hpc.resource_model.analytical.communication import exposed_s
from piper_hpc.resource_model.analytical.device import Device, Times
from piper_hpc.resource_model.analytical.network import Network, network_of
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.analytical.stages import Chunk, chunks
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import ClusterSpec, Degrees, Execution, ModelSpec, Workload

Memory = dict[str, list[Number]]
"""Kind -> bytes by pipeline rank."""


@dataclass(frozen=True)
class Step:
    """Terms and memory of one step. Every entry has a shape that broadcasts to that of the layout's fields.

    terms: exposed seconds of the busiest rank's step, they add up to step_time_s; memory: kind -> bytes by pipeline
    rank. What few ask for (hidden, ranks) is computed when it is asked for.
    """

    terms: dict[str, Number]
    memory: Memory
    message_s: Number
    micro_batches: Number
    stepper: Stepper

    @cached_property
    def hidden(self) -> dict[str, Number]:
        """Seconds that run beside compute, by term."""
        return self.stepper.hidden(self.terms)

    @cached_property
    def ranks(self) -> tuple[tuple[Times, ...], ...]:
        """Seconds of one micro-batch by pipeline rank and chunk."""
        return self.stepper.chunk_times()

    @cached_property
    def step_time_s(self) -> Number:
        """Seconds of the step."""
        return _sum(self.terms.values())

    @property
    def peak_bytes(self) -> Number:
        """Bytes of the fullest rank."""
        return peak_bytes(self.memory)


@dataclass(frozen=True)
class AlgorithmIndependent:
    """Costs of a step that no all-to-all algorithm changes, so that grids of several algorithms share them.

    weight_gather_s, gradient_reduce_s: seconds of one all-gather of weights and of one reduction of gradients over data
    parallel ranks, before overlap is deducted; weight_gathers, gradient_reduces: how many of each in a step.
    """

    memory: Memory
    weight_gather_s: Number
    gradient_reduce_s: Number
    weight_gathers: Number
    gradient_reduces: Number
    optimizer_s: Number
    p2p_s: Number


def peak_bytes(memory: Memory) -> Number:
    """Bytes of the fullest rank."""
    return reduce(np.maximum, [_sum(kinds) for kinds in zip(*memory.values(), strict=True)])


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
    if workload.recipe.gemm_dtype not in accelerator.peak_flops:
        known = ", ".join(accelerator.peak_flops)
        raise ResourceModelError(
            f"recipe '{workload.recipe.name}' multiplies in {workload.recipe.gemm_dtype}, a rate that is not known of "
            f"{accelerator.name} (known: {known}); use train.dtype=bfloat16"
        )
    shapes = Shapes(model, layout, workload, execution.sequence_parallel)
    network = network_of(cluster, layout)
    blocks = Blocks(shapes, Device(accelerator, workload.recipe, execution.fused_accumulation), network, execution)
    return Stepper(PlacedBlocks(blocks, network, layout.all_to_all), layout)


@dataclass(frozen=True)
class Stepper:
    """The step of one layout, or of a grid of layouts that share pp, vpp, schedule, algorithm and placement.

    Grids of other pipelines may share `placed_blocks`, which do not depend on how a pipeline cuts the model.
    """

    placed_blocks: PlacedBlocks
    layout: Degrees

    @cached_property
    def shapes(self) -> Shapes:
        """Sizes of one rank."""
        shared = self.placed_blocks.blocks.shapes
        return Shapes(shared.model, self.layout, shared.workload, shared.sequence_parallel)

    @property
    def device(self) -> Device:
        """What prices kernels."""
        return self.placed_blocks.blocks.device

    @property
    def network(self) -> Network:
        """What prices communication."""
        return self.placed_blocks.network

    @property
    def execution(self) -> Execution:
        """How the framework carries out a step."""
        return self.placed_blocks.blocks.execution

    @cached_property
    def micro_batches(self) -> Number:
        """Micro-batches of a step."""
        layout = self.layout
        return self.shapes.workload.global_batch / (layout.micro_batch * layout.dense_dp)

    def evaluate(self, algorithm_independent: AlgorithmIndependent | None = None) -> Step:
        """Every term, in seconds a step, and every stage's memory, in bytes.

        step_time_s = micro_batches * (forward + backward of the busiest rank) + bubble + exposed messages + exposed
        gradient reduction + optimizer + host; see schedule.closed_forms for the bubble. algorithm_independent: where
        another algorithm's stepper has it already.
        """
        layout, placed_blocks, micro_batches = self.layout, self.placed_blocks, self.micro_batches
        pp, vpp = layout.pp, layout.vpp
        algorithm_independent = algorithm_independent or self.algorithm_independent()
        counts, critical = self._busiest, self._critical
        every = [sum(of_part) for of_part in zip(*self._counts, strict=True)]
        rest = weighted_times([of_all - own for of_all, own in zip(every, counts, strict=True)], placed_blocks.totals)
        terms = {
            name: micro_batches * weighted(counts, [of_part.get(name, 0.0) for of_part in placed_blocks.seconds])
            for name in dict.fromkeys(term for of_part in placed_blocks.seconds for term in of_part)
        }
        idle: Number = 0.0
        if pp > 1:
            idle = schedule.bubble_s(layout.schedule, pp, vpp, _work(critical), _work(rest), micro_batches)
        terms["bubble_s"] = idle
        terms["p2p_s"] = algorithm_independent.p2p_s
        terms["grad_reduce_s"] = self._exposed_data_parallel_s(algorithm_independent)
        terms["optimizer_s"] = algorithm_independent.optimizer_s
        terms["other_s"] = self.device.accelerator.efficiency.step_host_s
        return Step(
            terms={name: _plain(seconds) for name, seconds in terms.items()},
            memory=algorithm_independent.memory,
            message_s=self._message_s,
            micro_batches=micro_batches,
            stepper=self,
        )

    def algorithm_independent(self, memory: Memory | None = None) -> AlgorithmIndependent:
        """The costs that no all-to-all algorithm changes; memory: where it is known already."""
        layout = self.layout
        waits = schedule.exposed_messages(
            layout.schedule, layout.pp, layout.vpp, self.micro_batches, blocking=not self.execution.overlap_p2p
        )
        gathered, scattered = self._data_parallel_s()
        return AlgorithmIndependent(
            memory=self.memory_by_rank() if memory is None else memory,
            weight_gather_s=gathered,
            gradient_reduce_s=scattered,
            # Sharded gradients have no place to add up in: every micro-batch reduces its own.
            weight_gathers=np.where(np.asarray(layout.zero) >= 3, self.micro_batches, 1.0),
            gradient_reduces=np.where(np.asarray(layout.zero) >= 2, self.micro_batches, 1.0),
            optimizer_s=self._optimizer(),
            p2p_s=waits * self._message_s,
        )

    def hidden(self, terms: dict[str, Number]) -> dict[str, Number]:
        """Seconds that run beside compute, by term: of gradients and weights, of expert rows where they overlap."""
        algorithm_independent = self.algorithm_independent(memory={})
        whole = (
            algorithm_independent.weight_gather_s * algorithm_independent.weight_gathers
            + algorithm_independent.gradient_reduce_s * algorithm_independent.gradient_reduces
        )
        hidden: dict[str, Number] = {"grad_reduce_s": whole - terms["grad_reduce_s"]}
        if self.execution.overlap_experts:
            hidden_s = self.micro_batches * weighted(self._busiest, self.placed_blocks.hidden_s)
            hidden |= {"dispatch_s": hidden_s, "combine_s": hidden_s}
        return {name: _plain(seconds) for name, seconds in hidden.items()}

    @cached_property
    def chunks(self) -> tuple[tuple[Chunk, ...], ...]:
        """The chunks of every pipeline rank."""
        layout = self.shapes.layout
        return chunks(self.shapes.model, layout.schedule, layout.pp, layout.vpp)

    # Time.

    @property
    def layer_s(self) -> tuple[Number, Number]:
        """Forward and backward seconds of the model's last kind of layer, which is the one with experts."""
        layer = self.placed_blocks.totals[len(self.placed_blocks.blocks.kinds) - 1]
        return layer.forward, layer.backward

    def chunk_times(self) -> tuple[tuple[Times, ...], ...]:
        """Seconds of one micro-batch by pipeline rank and chunk."""
        blocks, totals = self.placed_blocks.blocks, self.placed_blocks.totals
        return tuple(
            tuple(weighted_times(blocks.counts(chunk), totals) for chunk in of_rank) for of_rank in self.chunks
        )

    @cached_property
    def _counts(self) -> list[tuple[float, ...]]:
        """What every rank has of each part."""
        of_chunks = [[self.placed_blocks.blocks.counts(chunk) for chunk in of_rank] for of_rank in self.chunks]
        return [tuple(map(sum, zip(*of_rank, strict=True))) for of_rank in of_chunks]

    @cached_property
    def _busiest(self) -> Counts:
        """What the busiest rank has of each part; in a grid it may be another rank in every layout."""
        distinct = list(dict.fromkeys(self._counts))
        # A rank that has nothing more than another has is never busier.
        rivals = [
            one
            for one in distinct
            if not any(other != one and all(map(float.__le__, one, other)) for other in distinct)
        ]
        seconds = [times.forward + times.backward for times in self.placed_blocks.totals]
        chosen: list[Number] = list(rivals[0])
        longest = weighted(rivals[0], seconds)
        for rival in rivals[1:]:
            own = weighted(rival, seconds)
            longer = own > longest
            chosen = [
                old if isinstance(old, float) and old == new else np.where(longer, new, old)
                for new, old in zip(rival, chosen, strict=True)
            ]
            longest = np.maximum(own, longest)
        return [_plain(count) for count in chosen]

    @cached_property
    def _message_s(self) -> Number:
        return communication.message_s(self.shapes, self.network, self.execution) * (self.shapes.layout.pp > 1)

    @cached_property
    def _critical(self) -> Times:
        """One micro-batch on the busiest rank."""
        return weighted_times(self._busiest, self.placed_blocks.totals)

    def _data_parallel_s(self) -> tuple[Number, Number]:
        """Seconds of one all-gather of weights and of one reduction of gradients (ZeRO, arXiv 1910.02054).

        Without ZeRO an all-reduce of gradients; with it a reduce-scatter of gradients and an all-gather of weights;
        ZeRO 3 gathers for the backward too. Whole buffers, of the rank with the most parameters.
        """
        groups, links = self.network.groups, self.network.links
        zero = np.asarray(self.layout.zero)
        recipe = self.shapes.workload.recipe
        parameters = self._largest_parameters
        scattered: Number = 0.0
        gathered: Number = 0.0
        for group, count in ((groups.dense, parameters.dense), (groups.replicas, parameters.experts)):
            gradient_bytes = count * recipe.gradient_bytes
            weight_bytes = count * min(
                recipe.weight_bytes, recipe.value_bytes
            )  # FP8 copies are made where they are used
            scatter = collectives.reduce_scatter_s(group, links, gradient_bytes)
            reduced = collectives.all_reduce_s(group, links, gradient_bytes)
            sharded = (zero >= 1) * 1.0
            scattered = scattered + sharded * scatter + (1 - sharded) * reduced
            gathered = gathered + sharded * collectives.all_gather_s(group, links, weight_bytes)
        scattered = scattered + np.where(zero >= 3, 1.0, 0.0) * gathered
        return gathered, scattered

    def _exposed_data_parallel_s(self, algorithm_independent: AlgorithmIndependent) -> Number:
        """Exposed seconds of both: where the framework overlaps, they run beside the first forward and last backward.

        Sharded gradients beside the backward of every micro-batch, with ZeRO 3 weights beside both.
        """
        execution = self.execution
        whole = (
            algorithm_independent.weight_gather_s * algorithm_independent.weight_gathers
            + algorithm_independent.gradient_reduce_s * algorithm_independent.gradient_reduces
        )
        if not (execution.overlap_grads or execution.overlap_shards):
            return whole
        exposed = (
            exposed_s(algorithm_independent.weight_gather_s, self._critical.forward)
            * algorithm_independent.weight_gathers
        )
        exposed = (
            exposed
            + exposed_s(algorithm_independent.gradient_reduce_s, self._critical.backward)
            * algorithm_independent.gradient_reduces
        )
        overlaps = np.where(np.asarray(self.layout.zero) >= 3, execution.overlap_shards, execution.overlap_grads)
        return np.where(overlaps, exposed, whole)

    def _optimizer(self) -> Number:
        """AdamW reads gradients and states, writes states and weights; gradients are cleared, and read for the norm."""
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
        return [self.placed_blocks.blocks.parameters(of_rank) for of_rank in self.chunks]

    @cached_property
    def _largest_parameters(self) -> memory.Parameters:
        return memory.Parameters(
            reduce(np.maximum, [parameters.dense for parameters in self._parameters]),
            reduce(np.maximum, [parameters.experts for parameters in self._parameters]),
        )

    @cached_property
    def _gathered(self) -> Number:
        """Bytes of whole layers that ZeRO 3 holds for a while, of the largest kind."""
        layers = self.placed_blocks.blocks.layer_parameters.values()
        return reduce(np.maximum, [memory.gathered_bytes(self.shapes, layer) for layer in layers])

    def memory_by_rank(self) -> Memory:
        """Bytes by kind and pipeline rank; they depend on neither the all-to-all nor the placement."""
        shapes, execution, layout, blocks = self.shapes, self.execution, self.layout, self.placed_blocks.blocks
        messages = 2.0 * communication.message_bytes(shapes) * (layout.pp > 1)
        with_loss = {moe: np.maximum(bytes_, blocks.loss_bytes) for moe, bytes_ in blocks.backward_bytes.items()}
        by_rank = []
        for rank, of_rank in enumerate(self.chunks):
            alive = schedule.in_flight_by_chunk(layout.schedule, rank, layout.pp, layout.vpp, self.micro_batches)
            # Micro-batches times layers, by kind: small numbers, before they meet what one layer keeps of one.
            held: dict[bool, Number] = {}
            for count, chunk in zip(alive, of_rank, strict=True):
                for kind, number in chunk.layers:
                    held[kind.moe] = held.get(kind.moe, 0.0) + count * number
            present = {kind.moe for chunk in of_rank for kind, _ in chunk.layers}
            workspace = with_loss if any(chunk.last for chunk in of_rank) else blocks.backward_bytes
            by_rank.append(
                memory.state_bytes(shapes, self._parameters[rank])
                | {
                    "activations": sum(count * blocks.activation_bytes[moe] for moe, count in held.items()),
                    "workspace": workspace[of_rank[-1].layers[-1][0].moe],
                    "weight_gradients": memory.weight_gradient_bytes(
                        shapes, execution, dense=False in present, moe=True in present
                    ),
                    "messages": messages,
                    "gathered": self._gathered,
                    "framework": self.device.accelerator.efficiency.framework_bytes,
                }
            )
        return {kind: [_plain(of_rank[kind]) for of_rank in by_rank] for kind in by_rank[0]}


def _sum(values: Iterable[Number]) -> Number:
    """The sum: equal shapes first, then from small to large, so that few additions are as large as the grid."""
    of_shape: dict[tuple[int, ...], Number] = {}
    for value in values:
        shape = np.shape(value)
        of_shape[shape] = of_shape[shape] + value if shape in of_shape else value
    first, *rest = sorted(of_shape.values(), key=np.size)
    total: Number = sum(rest, first)
    return total


def _work(times: Times) -> schedule.Work:
    return schedule.Work(times.forward, times.input_grad, times.weight_grad)


def _plain(value: Number) -> Number:
    """A float where NumPy made an array of a single layout's number."""
    return float(value) if np.ndim(value) == 0 else value
