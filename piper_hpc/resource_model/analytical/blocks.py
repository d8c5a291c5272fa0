"""Seconds and bytes of one layer of each kind, of the embedding and of the head, on one rank and for one micro-batch.

A grid of layouts computes these once. They depend on tp, cp, ep, etp, the micro-batch and recompute alone; how expert
rows travel (`PlacedBlocks`) also on the algorithm and on where ranks stand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

from piper_hpc.resource_model.analytical import communication, compute, memory
from piper_hpc.resource_model.analytical.device import Device, Times
from piper_hpc.resource_model.analytical.host import launches
from piper_hpc.resource_model.analytical.network import Network
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.analytical.stages import Chunk, Kind, kinds
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Execution

Modules = dict[str, Times]
"""Term -> seconds of one micro-batch."""

Counts = Sequence[Number]
"""How often a rank has each part: layers of every kind, then the first and the last end of the model."""


@dataclass(frozen=True)
class Blocks:
    """Layers and ends without dispatch and combine, for one layout or a grid of them."""

    shapes: Shapes
    device: Device
    network: Network
    execution: Execution

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of layer."""
        return kinds(self.shapes.model)

    @cached_property
    def modules(self) -> tuple[Modules, ...]:
        """Of a layer of each kind, of the first end (embedding) and of the last (head, loss, what joins MTP layers)."""
        shapes, device, execution = self.shapes, self.device, self.execution
        head = compute.head(device, shapes, execution)
        head += communication.tensor_parallel(shapes, self.network, execution, head)
        mtp = shapes.model.mtp_layers
        last = {"head_s": head * (1 + mtp)}
        if mtp:
            # Each MTP module projects two hidden states to one, and is then a layer (arXiv 2412.19437).
            last["expert_s"] = device.linear(shapes.local_tokens, 2 * shapes.model.hidden, shapes.model.hidden) * mtp
        return (*map(self._layer, self.kinds), {"head_s": compute.embedding(device, shapes)}, last)

    @cached_property
    def totals(self) -> tuple[Times, ...]:
        """Seconds of every part."""
        return tuple(total(modules.values()) for modules in self.modules)

    @cached_property
    def seconds(self) -> tuple[dict[str, Number], ...]:
        """Seconds of every part by term, forward and backward."""
        return tuple(
            {term: times.forward + times.backward for term, times in modules.items()} for modules in self.modules
        )

    def counts(self, chunk: Chunk) -> tuple[float, ...]:
        """What a chunk holds of every part; layers of multi-token prediction are of the last layer's kind."""
        model = self.shapes.model
        layers = dict(chunk.layers)
        if chunk.last and model.mtp_layers:
            kind = Kind(model.is_moe(model.layers - 1), model.window(model.layers - 1))
            layers[kind] = layers.get(kind, 0) + model.mtp_layers
        return (*(float(layers.get(kind, 0)) for kind in self.kinds), float(chunk.first), float(chunk.last))

    def _layer(self, kind: Kind) -> Modules:
        shapes, device, execution = self.shapes, self.device, self.execution
        recompute = shapes.layout.recomputed
        core = compute.core_attention(device, shapes, execution, kind.window)
        attention = compute.attention(device, shapes, execution, kind.window)
        attention += communication.tensor_parallel(shapes, self.network, execution, attention)
        attention += communication.context_parallel(shapes, self.network, core)
        modules = {"attention_s": attention}
        if kind.moe:
            shared = compute.shared(device, shapes)
            if shapes.model.dense_width:
                shared += communication.tensor_parallel(shapes, self.network, execution, shared)
            moe = {
                "router_s": compute.router(device, shapes),
                "dispatch_s": compute.permute(device, shapes),
                "expert_s": compute.experts(device, shapes) + shared,
                "combine_s": compute.unpermute(device, shapes)
                + communication.gather_tokens(shapes, self.network, execution)
                + compute.residual(device, shapes, execution),
            }
            modules |= {term: times.with_recompute(recompute.moe * (1 - recompute.full)) for term, times in moe.items()}
        else:
            dense = compute.dense(device, shapes, execution)
            modules["expert_s"] = dense + communication.tensor_parallel(shapes, self.network, execution, dense)
        modules["host_s"] = launches(shapes, execution, moe=kind.moe) * device.accelerator.efficiency.launch_s
        return {term: times.with_recompute(recompute.full) for term, times in modules.items()}

    # Bytes.

    @cached_property
    def activation_bytes(self) -> dict[bool, Number]:
        """Activations that a layer with experts, and one without, keeps of one micro-batch."""
        return {moe: memory.layer_bytes(self.shapes, self.execution, moe=moe) for moe in self._with_experts}

    @cached_property
    def backward_bytes(self) -> dict[bool, Number]:
        """Bytes alive inside the backward of such a layer."""
        return {moe: memory.backward_bytes(self.shapes, self.execution, moe=moe) for moe in self._with_experts}

    @cached_property
    def loss_bytes(self) -> Number:
        """Bytes alive at the loss."""
        shapes = self.shapes
        table = shapes.model.embedding_parameters / shapes.layout.tp * shapes.value_bytes
        return memory.head_bytes(shapes, self.execution) + table * self.execution.transformer_engine

    @cached_property
    def layer_parameters(self) -> dict[bool, memory.Parameters]:
        """Parameters of a layer with experts, and of one without."""
        return {moe: memory.layer_parameters(self.shapes, moe=moe) for moe in self._with_experts}

    def parameters(self, of_rank: Sequence[Chunk]) -> memory.Parameters:
        """Parameters of all chunks of a rank."""
        parts = [
            memory.end_parameters(self.shapes, first=chunk.first, last=chunk.last)
            + reduce(
                memory.Parameters.__add__, [self.layer_parameters[kind.moe] * count for kind, count in chunk.layers]
            )
            for chunk in of_rank
        ]
        model = self.shapes.model
        if model.mtp_layers and any(chunk.last for chunk in of_rank):
            parts.append(self.layer_parameters[model.is_moe(model.layers - 1)] * model.mtp_layers)
            parts.append(memory.Parameters(model.mtp_layers * 2.0 * model.hidden**2))
        return reduce(memory.Parameters.__add__, parts)

    @property
    def _with_experts(self) -> set[bool]:
        return {kind.moe for kind in self.kinds}


@dataclass(frozen=True)
class PlacedBlocks:
    """Blocks with dispatch and combine, by one algorithm in one placement."""

    blocks: Blocks
    network: Network
    algorithm: str

    @cached_property
    def whole(self) -> Times:
        """Seconds of a dispatch, or of a combine, in a layer with experts; recomputed with it."""
        shapes, recompute = self.blocks.shapes, self.blocks.shapes.layout.recomputed
        seconds = communication.expert_all_to_all_s(self.blocks.device, shapes, self.network, self.algorithm)
        return (
            Times(seconds, seconds).with_recompute(recompute.moe * (1 - recompute.full)).with_recompute(recompute.full)
        )

    @cached_property
    def exposed(self) -> tuple[Times, ...]:
        """What of it is exposed, in every part: with overlap both run beside the kernels of another micro-batch."""
        exposed = []
        for times, moe in zip(self.blocks.totals, self._with_experts, strict=True):
            if not moe:
                exposed.append(Times())
            elif not self.blocks.execution.overlap_experts:
                exposed.append(self.whole)
            else:
                forward = communication.exposed_s(2 * self.whole.forward, times.forward) / 2
                exposed.append(Times(forward, communication.exposed_s(2 * self.whole.backward, times.backward) / 2))
        return tuple(exposed)

    @cached_property
    def hidden_s(self) -> tuple[Number, ...]:
        """Seconds of a dispatch, or of a combine, that run beside compute, in every part."""
        whole = self.whole.forward + self.whole.backward
        return tuple(
            whole - times.forward - times.backward if moe else 0.0
            for times, moe in zip(self.exposed, self._with_experts, strict=True)
        )

    @cached_property
    def totals(self) -> tuple[Times, ...]:
        """Seconds of every part."""
        return tuple(
            times + exposed * 2.0 if moe else times
            for times, exposed, moe in zip(self.blocks.totals, self.exposed, self._with_experts, strict=True)
        )

    @cached_property
    def seconds(self) -> tuple[dict[str, Number], ...]:
        """Seconds of every part by term, forward and backward."""
        return tuple(
            of_part | {term: of_part[term] + exposed.forward + exposed.backward for term in ("dispatch_s", "combine_s")}
            if moe
            else of_part
            for of_part, exposed, moe in zip(self.blocks.seconds, self.exposed, self._with_experts, strict=True)
        )

    @property
    def _with_experts(self) -> list[bool]:
        return [*(kind.moe for kind in self.blocks.kinds), False, False]


def total(times: Iterable[Times]) -> Times:
    """The sum of several."""
    return reduce(Times.__add__, times, Times())


def weighted(counts: Counts, values: Sequence[Number]) -> Number:
    """Sum over parts of count times value; a part that is nowhere costs nothing."""
    terms = [
        count * value
        for count, value in zip(counts, values, strict=True)
        if not (isinstance(count, float) and count == 0)
    ]
    return sum(terms[1:], terms[0]) if terms else 0.0


def weighted_times(counts: Counts, values: Sequence[Times]) -> Times:
    """The same for seconds of forward and backward."""
    return Times(
        *(
            weighted(counts, [getattr(times, name) for times in values])
            for name in ("forward", "input_grad", "weight_grad")
        )
    )
