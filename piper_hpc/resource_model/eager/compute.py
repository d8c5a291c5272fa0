"""Seconds of every module for one micro-batch, forward and backward, counted operation by operation.

The counts are those of the modules as torch runs them eagerly on a CPU: what a dispatch-level trace of one forward
and backward shows. A streaming operation is charged for the numbers it reads and writes; an operation on small
tensors or on none (a view) is charged as one `host_op`, which holds the launch of its backward too. RMSNorm, the router
and the permutations of dispatch and combine are measured whole: composed of such operations they come out half as long,
and less.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import NORM_FORWARD_SHARE, Curves
from piper_hpc.spec import ModelSpec, Recipe, Recompute

HOST_OPERATIONS = {
    "attention": 26,
    "latent_attention": 40,
    "feed_forward": 5,
    "router": 1,
    "dispatch_all_to_all": 14,
    "experts": 1,
    "embedding": 2,
    "head": 9,
}
"""Small operations and views of each module's forward; those of `dispatch_all_to_all` come with a group above one."""

AUTOGRAD_OPERATIONS = 65
"""Autograd between the modules of a layer, in eager operations: views, hooks and Python functions of a backward.

0.27 ms where one operation takes 4 us, measured once, on one CPU rank without communication.
"""


@dataclass(frozen=True)
class ModuleCost:
    """Seconds of one module for one micro-batch on one rank. weight: the share of the whole backward that gives the
    gradients of weights, which needs nobody and which a schedule may put off (W of arXiv 2401.10241)."""

    forward: Cost
    backward: Cost
    weight: Cost = field(default_factory=Cost)

    def __mul__(self, count: float) -> ModuleCost:
        return ModuleCost(self.forward * count, self.backward * count, self.weight * count)

    def __add__(self, other: ModuleCost) -> ModuleCost:
        return ModuleCost(self.forward + other.forward, self.backward + other.backward, self.weight + other.weight)

    def again(self, forward: Cost) -> ModuleCost:
        """This module where `forward`, or a part of it, is computed once more in the backward."""
        return ModuleCost(self.forward, self.backward + forward, self.weight)


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at once: `sequences` of `sequence` tokens.

    tokens * top_k rows leave every rank; `load` times as many arrive at the busiest of an expert group.
    """

    model: ModelSpec
    curves: Curves
    sequences: int
    sequence: int
    recipe: Recipe
    load: float = 1.0

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one activation."""
        return self.recipe.value_bytes

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.sequences * self.sequence

    @property
    def rows(self) -> int:
        """Rows that the experts of a rank compute, on average."""
        return self.tokens * self.model.top_k

    @property
    def hidden(self) -> int:
        """Numbers in the hidden states."""
        return self.tokens * self.model.hidden

    def stream(self, *operations: tuple[float, int]) -> Cost:
        """Streaming operations, each given as (numbers read and written, how many such operations)."""
        return total(self.stream_bytes(values * self.bytes_per_value, count) for values, count in operations)

    def stream_bytes(self, moved: float, count: float = 1) -> Cost:
        """`count` streaming operations, each of which reads and writes `moved` bytes, whatever the types."""
        return self.curves.operation("elementwise", moved, count)

    def gather(self) -> Cost:
        """One permutation of [rows, hidden]: each row read and written."""
        return self.curves.operation("gather", 2 * self.rows * self.model.hidden * self.bytes_per_value)

    def sort(self) -> Cost:
        """Argsort of all rows by expert or rank."""
        return self.curves.operation("sort", self.rows)

    def exponential(self, values: float, bytes_per_value: int | None = None) -> Cost:
        """One operation with an exponential for each result; `values` numbers are read and written."""
        return self.curves.operation("activation", values * (bytes_per_value or self.bytes_per_value))

    def linear(self, inputs: int, outputs: int) -> ModuleCost:
        """[tokens, inputs] x [inputs, outputs], and its backward: two products, and the sum of the weight gradient."""
        product = self.curves.operation("gemm", 2 * self.tokens * inputs * outputs)
        weight = product + self.accumulate(inputs * outputs)
        return ModuleCost(product, product + weight, weight)

    def accumulate(self, parameters: int) -> Cost:
        """Adding one weight's new gradient to its sum, which may have wider numbers: read both, write one."""
        return self.stream_bytes(parameters * (self.bytes_per_value + 2 * self.recipe.gradient_bytes))

    def host(self, operations: int) -> ModuleCost:
        """Operations that cost only their launch; half of it is the backward's."""
        half = self.curves.launches(operations / 2)
        return ModuleCost(half, half)


def norm(batch: MicroBatch, width: int = 0) -> ModuleCost:
    """A norm over `width` numbers of every token, 0 for the hidden width: measured as RMSNorm with its backward, and
    split by the numbers that each of them moves."""
    values = batch.tokens * (width or batch.model.hidden)
    both = batch.curves.operation("norm", 2 * values * batch.bytes_per_value)
    return ModuleCost(both * NORM_FORWARD_SHARE, both * (1 - NORM_FORWARD_SHARE))


def router(batch: MicroBatch) -> ModuleCost:
    """Norm, gate, and from its scores the choice, weights and losses; its backward joins three branches' gradients."""
    scores = batch.tokens * batch.model.experts
    half = batch.curves.operation("router", scores) * 0.5
    return sum_modules(
        norm(batch),
        batch.linear(batch.model.hidden, batch.model.experts),
        ModuleCost(half + batch.stream((scores, 1)), half + batch.stream((3 * scores, 2), (3 * batch.hidden, 2))),
        batch.host(HOST_OPERATIONS["router"]),
    )


def experts(batch: MicroBatch, ep: int, load: float = 1.0) -> ModuleCost:
    """n_mat grouped GEMMs of 2 rows d f FLOPs, and the activation; two each in the backward, and E/EP gradient sums.

    load: rows of this rank over the mean.
    """
    model, received = batch.model, load * batch.rows
    matrices, gated = model.matrices_per_expert, model.matrices_per_expert == 3
    flops = 2 * received * model.hidden * model.expert_ffn
    grouped = batch.curves.grouped_product(flops, received / (model.experts // ep))
    rows = received * model.hidden
    gradients = inner_backward(batch, received, model.expert_ffn, gated=gated) + batch.stream((3 * rows, int(gated)))
    weights = batch.accumulate(model.experts // ep * model.hidden * model.expert_ffn) * matrices
    # A bias is read by row, and its gradient added up by row.
    biased = batch.stream((3 * received * model.expert_ffn, matrices - 1), (3 * rows, 1)) * model.ffn_bias
    return batch.host(HOST_OPERATIONS["experts"]) + ModuleCost(
        grouped * matrices + activation_forward(batch, load) + biased,
        grouped * (2 * matrices) + gradients + weights + biased,
        grouped * matrices + weights,
    )


def activation_forward(batch: MicroBatch, load: float = 1.0) -> Cost:
    """The activation of the rows of the experts."""
    gated = batch.model.matrices_per_expert == 3
    return inner_forward(batch, load * batch.rows, batch.model.expert_ffn, gated=gated)


def inner_forward(batch: MicroBatch, rows: float, width: int, *, gated: bool) -> Cost:
    """silu(gate) * up of rows of an inner width, gelu without a gate; gpt-oss clamps both and adds to one."""
    inner = rows * width
    clamps = batch.stream((2 * inner, 4), (3 * inner, 1)) * bool(batch.model.swiglu_limit)
    return batch.exponential(2 * inner) + batch.stream((3 * inner, int(gated))) + clamps


def inner_backward(batch: MicroBatch, rows: float, width: int, *, gated: bool) -> Cost:
    """The backward of `inner_forward`."""
    inner = rows * width
    clamps = batch.stream((3 * inner, 5)) * bool(batch.model.swiglu_limit)
    return batch.exponential(3 * inner) + batch.stream((3 * inner, 2 * gated)) + clamps


def feed_forward(batch: MicroBatch, width: int, matrices: int, recompute: Recompute) -> ModuleCost:
    """A feed-forward that every token passes: its products, and the activation, perhaps once more."""
    gated = matrices == 3
    forward = inner_forward(batch, batch.tokens, width, gated=gated)
    backward = inner_backward(batch, batch.tokens, width, gated=gated) + batch.stream((3 * batch.hidden, int(gated)))
    cost = sum_modules(
        batch.linear(batch.model.hidden, width) * (matrices - 1),
        batch.linear(width, batch.model.hidden),
        ModuleCost(forward, backward),
        batch.host(HOST_OPERATIONS["feed_forward"]),
    )
    return cost.again(forward) if recompute.activation else cost


def dense(batch: MicroBatch, recompute: Recompute) -> ModuleCost:
    """The feed-forward of a layer without experts, its norm and its residual."""
    model = batch.model
    added = batch.stream((3 * batch.hidden, 1))
    return sum_modules(
        norm(batch), feed_forward(batch, model.dense_ffn, model.dense_matrices, recompute), ModuleCost(added, added)
    )


def shared_experts(batch: MicroBatch, recompute: Recompute) -> ModuleCost:
    """The experts that every token passes, with their gate and the sum with routed ones."""
    model, added = batch.model, batch.stream((3 * batch.hidden, 1))
    if not model.shared_experts:
        return ModuleCost(Cost(), Cost())
    width = model.shared_experts * model.shared_expert_ffn
    cost = feed_forward(batch, width, model.matrices_per_expert, recompute) + ModuleCost(added, added)
    return cost + batch.linear(model.hidden, 1) + ModuleCost(added, added * 2) if model.shared_expert_gate else cost


def dense_residual(batch: MicroBatch, recompute: Recompute) -> ModuleCost:
    """The feed-forward beside the MoE part of a layer (Arctic)."""
    model, added = batch.model, batch.stream((3 * batch.hidden, 1))
    if not model.dense_residual_ffn:
        return ModuleCost(Cost(), Cost())
    residual = feed_forward(batch, model.dense_residual_ffn, model.dense_matrices, recompute)
    return norm(batch) + residual + ModuleCost(added, added)


def autograd_overhead(batch: MicroBatch) -> ModuleCost:
    """Host time of autograd between the modules of a layer, in the backward: AUTOGRAD_OPERATIONS launches."""
    return ModuleCost(Cost(), batch.curves.launches(AUTOGRAD_OPERATIONS))


def embedding(batch: MicroBatch) -> ModuleCost:
    """One row of the table per token; the backward fills a gradient of the whole table and adds it up."""
    table = batch.model.embedding_parameters
    gradient = batch.stream((batch.hidden + table, 1)) + batch.accumulate(table)
    lookup = ModuleCost(batch.stream((2 * batch.hidden, 1)), gradient, gradient)
    return lookup + batch.host(HOST_OPERATIONS["embedding"])


def head(batch: MicroBatch) -> ModuleCost:
    """Final norm, output projection and cross entropy, whose numbers have four bytes at least (loss_bytes)."""
    logits, wide = batch.tokens * batch.model.vocab, loss_bytes(batch.bytes_per_value)
    cast = batch.stream_bytes(logits * (wide + batch.bytes_per_value), int(wide > batch.bytes_per_value))
    loss = ModuleCost(
        cast + batch.exponential(2 * logits, wide) + batch.stream_bytes(logits * wide),
        cast + batch.stream_bytes(2 * logits * wide) + batch.exponential(3 * logits, wide),
    )
    projection = batch.linear(batch.model.hidden, batch.model.vocab)
    return sum_modules(norm(batch), projection, loss, batch.host(HOST_OPERATIONS["head"]))


def loss_bytes(bytes_per_value: int) -> int:
    """Bytes of one number of the loss: it is computed in fp32 where activations have 16 bits."""
    return max(4, bytes_per_value)


def sum_modules(first: ModuleCost, *others: ModuleCost) -> ModuleCost:
    """The sum of module costs."""
    return sum(others, first)
