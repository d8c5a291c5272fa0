"""Seconds of a layer and of a chunk of layers for one micro-batch, by term, recomputation included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from piper_hpc.resource_model.eager import attention, communication, compute, rows
from piper_hpc.resource_model.eager.activations import MOE
from piper_hpc.resource_model.eager.compute import MicroBatch, ModuleCost
from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.delays import variance_alone, variance_of_meetings
from piper_hpc.resource_model.eager.dispatch import DispatchCombine
from piper_hpc.resource_model.eager.groups import Group
from piper_hpc.resource_model.eager.saved_quota import Waits, after_waits
from piper_hpc.spec import LayerKind, Recompute, get_algorithm

HOST_OPERATIONS_PER_MICRO_BATCH = 120
"""Python of torch's pipeline per micro-batch of a chunk, in eager operations: 0.5 ms of 1F1B where one operation takes
4 us, measured once on a CPU."""
SPLIT_OPERATIONS = 90, 170
"""Python of torch's split backward per layer beyond a backward in whole, in eager operations: walks over the graph in
I, a call of autograd for each group of weights in W. One reading of their sum on chunks of one to three layers, median
260 of 216 to 339, of which a third is laid on I; `python -m tests.parallel.split_cost` then gave 229 to 319."""

DENSE_OVERHEAD = 0.4
"""Of a layer's autograd overhead between modules that of a dense one, which has two regions where others have five."""


@dataclass(frozen=True)
class Work:
    """Seconds of some modules for one micro-batch, by term.

    variance_s2: of their forward and of their backward from one micro-batch to the next, in a pipeline (delays).
    """

    modules: Mapping[str, ModuleCost]
    variance_s2: tuple[float, float] = (0.0, 0.0)

    @cached_property
    def forward_s(self) -> float:
        """Seconds of one forward."""
        return sum(cost.forward.seconds for cost in self.modules.values())

    @cached_property
    def backward_s(self) -> float:
        """Seconds of one whole backward."""
        return sum(cost.backward.seconds for cost in self.modules.values())

    @cached_property
    def weight_s(self) -> float:
        """Of them, those of the gradients of weights."""
        return sum(cost.weight.seconds for cost in self.modules.values())


@dataclass(frozen=True)
class ChunkCost:
    """Seconds of one global stage for one micro-batch: its layers, some of each kind, and what it does beside them.

    split: what a backward in two halves costs beyond one in whole. torch computes no gradient of token ids: under a
    split backward the first stage does all of it with its weights', and nothing in halves.
    """

    layers: tuple[tuple[Work, int], ...]
    beside: Work
    first: bool
    split: ModuleCost

    @property
    def forward_s(self) -> float:
        """Seconds of one forward."""
        return sum(count * layer.forward_s for layer, count in self.layers) + self.beside.forward_s

    @property
    def backward_s(self) -> float:
        """Seconds of one whole backward."""
        return sum(count * layer.backward_s for layer, count in self.layers) + self.beside.backward_s

    @property
    def variance_s2(self) -> tuple[float, float]:
        """Of a forward and of a backward."""
        forward, backward = (sum(count * layer.variance_s2[way] for layer, count in self.layers) for way in (0, 1))
        return forward, backward

    @property
    def weight_s(self) -> float:
        """Of them, those of the gradients of weights."""
        if self.first:
            return self.backward_s
        layers = sum(count * layer.weight_s for layer, count in self.layers)
        return layers + self.beside.weight_s + self.split.weight.seconds

    def terms(self, micro_batches: int, split: int) -> dict[str, Cost]:
        """Busy seconds of a step by term. split: for how many of the micro-batches the weights' gradients are computed
        apart from the inputs': their seconds are `weight_grad_s`."""
        step: dict[str, Cost] = {}
        scaled = [(term, cost * count) for layer, count in self.layers for term, cost in layer.modules.items()]
        for term, cost in (*scaled, *self.beside.modules.items()):
            weight = cost.backward if self.first else cost.weight
            whole = cost.forward * micro_batches + cost.backward * (micro_batches - split)
            step[term] = step.get(term, Cost()) + whole + (cost.backward + weight * -1) * split
            if split:
                step["weight_grad_s"] = step.get("weight_grad_s", Cost()) + weight * split
        if split:
            step["weight_grad_s"] += self.split.weight * split
            step["other_s"] += (self.split.backward + self.split.weight * -1) * split
        return step


def split_cost(batch: MicroBatch, layers: int, *, first: bool) -> ModuleCost:
    """What the backward of a chunk of `layers` layers costs in two halves beyond one in whole."""
    if first:
        return ModuleCost(Cost(), Cost())
    half_input, half_weight = (batch.curves.launches(layers * count) for count in SPLIT_OPERATIONS)
    return ModuleCost(Cost(), half_input + half_weight, half_weight)


def dense_layer_cost(batch: MicroBatch, recompute: Recompute, kind: LayerKind, *, pipelined: bool = False) -> Work:
    """Seconds of one layer without experts by term: nothing waits for another rank."""
    whole = attention.attention(batch, kind)
    if recompute.attention:
        whole = whole.again(attention.scores_forward(batch, kind))
    overhead = compute.autograd_overhead(batch) * DENSE_OVERHEAD
    modules = {"attention_s": whole, "expert_s": compute.dense(batch, recompute), "other_s": overhead}
    if recompute.full:
        modules = {term: cost.again(cost.forward) for term, cost in modules.items()}
    return Work(modules, _variance_alone(batch.curves, modules) if pipelined else (0.0, 0.0))


def layer_cost(
    batch: MicroBatch,
    ep: int,
    group: Group,
    exchange: DispatchCombine,
    recompute: Recompute,
    kind: LayerKind = MOE,
    *,
    overlap_shared: bool = False,
    pipelined: bool = False,
) -> Work:
    """Seconds of one layer by term, on the mean rank. Five all-to-alls synchronise its expert group, each with a wait.

    Between combine and the next dispatch lies attention's and the router's compute, between dispatch and combine the
    experts', both ways; in forward, between the all-to-alls of counts and of rows, what a dispatch computes by itself.
    At each of them ranks wait for arrival skew, which grows with that compute and is hidden by rows that are under way
    (communication.arrival_skew), and where experts come before it, for the rank with the most rows. What is recomputed
    is so in the backward, and whole layers with their all-to-alls and waits. overlap_shared: rows are on their way
    while shared experts are computed, and what of that time the latter take is no dispatch's. Where ranks have a CPU
    quota, what follows a wait is shorter (saved_quota).
    """
    curves = batch.curves

    def experts_with(load: float) -> ModuleCost:
        cost = compute.experts(batch, ep, load)
        return cost.again(compute.activation_forward(batch, load)) if recompute.activation else cost

    # Padding is computed by every rank; what is routed unevenly by the busiest alone.
    mean_load = batch.load if get_algorithm(exchange.selection.config.algorithm).padded else 1.0
    attended, router, experts = attention.attention(batch, kind), compute.router(batch), experts_with(mean_load)
    if recompute.attention:
        attended = attended.again(attention.scores_forward(batch, kind))
    shared = compute.shared_experts(batch, recompute)
    wire, counts = exchange.wire, rows.counts_wire(batch, group)
    hidden = _hidden(wire.cost, shared) if overlap_shared else ModuleCost(Cost(), Cost())
    dense, planned = attended + router, rows.dispatch(batch, Group())
    imbalance = experts_with(batch.load) + experts * -1

    under_way_s = max(0.0, wire.idle_s - counts.idle_s)
    late_for_counts = communication.arrival_skew(curves, group, dense.forward)

    def late(before_rows: Cost) -> Cost:
        return communication.arrival_skew(curves, group, before_rows, under_way_s)

    late_for_rows = ModuleCost(late(planned.forward), late(experts.backward))
    late_for_results = ModuleCost(late(experts.forward), late(dense.backward))
    modules = {
        "attention_s": attended,
        "router_s": router,
        "dispatch_s": exchange.dispatch + late_for_rows + ModuleCost(late_for_counts, imbalance.backward) + hidden * -1,
        "expert_s": experts + shared + compute.dense_residual(batch, recompute),
        "combine_s": exchange.combine + late_for_results + ModuleCost(imbalance.forward, Cost()),
        "other_s": compute.autograd_overhead(batch),
    }
    if curves.quota is not None:
        idle = ModuleCost(Cost(wire.idle_s), Cost(wire.idle_s))
        received_s = wire.computed_s / 2  # the other half is sent before the wait
        waits = Waits(
            dispatched=idle + late_for_rows + hidden * -1,
            combined=idle + late_for_results,
            received_s=received_s,
            counts_s=counts.idle_s + late_for_counts.seconds,
            planned_s=(counts.computed_s + planned.forward.seconds) / 2 + received_s,
        )
        modules = after_waits(curves.quota, modules, waits)
    forward_s2 = backward_s2 = 0.0
    if pipelined and group.size == 1:
        forward_s2, backward_s2 = _variance_alone(curves, modules)
    elif pipelined:
        forward_s2 = variance_of_meetings((late_for_counts, late_for_rows.forward, late_for_results.forward), group)
        backward_s2 = variance_of_meetings((late_for_rows.backward, late_for_results.backward), group)
    if recompute.full:
        modules = {term: cost.again(cost.forward) for term, cost in modules.items()}
        backward_s2 += forward_s2
    return Work(modules, (forward_s2, backward_s2))


def _variance_alone(curves: Curves, modules: Mapping[str, ModuleCost]) -> tuple[float, float]:
    forward, backward = (total(getattr(cost, way) for cost in modules.values()) for way in ("forward", "backward"))
    return variance_alone(curves, forward), variance_alone(curves, backward)


def _hidden(wire: Cost, shared: ModuleCost) -> ModuleCost:
    """What of a dispatch's way runs beside shared experts, and of its gradients' beside their backward."""
    if not wire.seconds:
        return ModuleCost(Cost(), Cost())
    forward, backward = (min(1.0, each.seconds / wire.seconds) for each in (shared.forward, shared.backward))
    return ModuleCost(wire * forward, wire * backward)


def work_beside_layers(
    batch: MicroBatch, *, first: bool, last: bool, pipelined: bool, boundaries: Sequence[str]
) -> Work:
    """What a stage does beside its layers: the model's ends where it holds them, the Python of a pipeline, and what
    its messages cost. boundaries: tiers of the links to the stages before and after, but to those of the same rank;
    over each goes one message in forward and one in backward."""
    ends = [compute.embedding(batch)] * first + [compute.head(batch)] * last
    modules = {"host_s": batch.host(HOST_OPERATIONS_PER_MICRO_BATCH if pipelined else 0)}
    if ends:
        modules["head_s"] = compute.sum_modules(*ends)
    if boundaries:
        message_bytes = batch.hidden * batch.bytes_per_value
        messages = total(communication.overhead(batch.curves, tier, message_bytes) for tier in boundaries)
        modules["other_s"] = ModuleCost(messages, messages)
    return Work(modules)
