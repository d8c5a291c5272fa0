"""Seconds of every module for one micro-batch, forward and backward, counted operation by operation."""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.resource_model import communication, flops
from piper_hpc.resource_model.cost import Cost, total
from piper_hpc.resource_model.curves import Curves
from piper_hpc.resource_model.groups import Group
from piper_hpc.spec import ModelSpec

INDEX_BYTES = 8
"""torch's indices and counts are int64."""


@dataclass(frozen=True)
class ModuleCost:
    """Seconds of one module for one micro-batch on one rank."""

    forward: Cost
    backward: Cost

    def __mul__(self, count: float) -> ModuleCost:
        return ModuleCost(self.forward * count, self.backward * count)

    def __add__(self, other: ModuleCost) -> ModuleCost:
        return ModuleCost(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at once: `tokens` = micro_batch * sequence, and the rows its experts then receive.

    Routing is taken as balanced: tokens * top_k rows leave a rank, and as many arrive.
    """

    model: ModelSpec
    curves: Curves
    sequences: int
    sequence: int
    bytes_per_value: int

    @property
    def tokens(self) -> int:
        """Tokens of one rank."""
        return self.sequences * self.sequence

    @property
    def rows(self) -> int:
        """Rows of one rank's experts."""
        return self.tokens * self.model.top_k

    def gemm(self, flops_: float, count: float = 1) -> Cost:
        """`count` matrix products of `flops_` each."""
        return self.curves.operation("gemm", flops_, count)

    def stream(self, values: float, count: float = 1) -> Cost:
        """`count` operations that read and write `values` numbers in all, each."""
        return self.curves.operation("elementwise", values * self.bytes_per_value, count)


def norm(batch: MicroBatch) -> ModuleCost:
    """RMSNorm: reads and writes its rows; the backward reads the rows and their gradient, and writes a gradient."""
    values = batch.tokens * batch.model.hidden
    return ModuleCost(batch.stream(2 * values), batch.stream(3 * values))


def attention(batch: MicroBatch) -> ModuleCost:
    """Norm, Q, K and V, RoPE on Q and K, causal attention, output projection, residual add."""
    model, tokens = batch.model, batch.tokens
    q, kv, hidden = model.q_dim, model.kv_dim, tokens * model.hidden
    projections = [2 * tokens * model.hidden * width for width in (q, kv, kv, q)]
    scores = tokens * flops.score_flops(model, batch.sequence)
    rope = total([batch.stream(2 * tokens * q, 2), batch.stream(2 * tokens * kv, 2)])
    gemms = total(batch.gemm(work) for work in projections)
    forward = gemms + rope + batch.curves.operation("attention_forward", scores) + batch.stream(3 * hidden)
    backward = gemms * 2 + rope + batch.curves.operation("attention_backward", scores) + batch.stream(3 * hidden, 3)
    return norm(batch) + ModuleCost(forward, backward)


def router(batch: MicroBatch) -> ModuleCost:
    """Norm, gate, softmax, top-k and the auxiliary loss."""
    model, tokens = batch.model, batch.tokens
    gate = batch.gemm(2 * tokens * model.hidden * model.experts)
    scores = tokens * model.experts
    return norm(batch) + ModuleCost(
        gate + batch.stream(2 * scores, 5),
        gate * 2 + batch.stream(3 * scores, 5) + batch.stream(3 * tokens * model.hidden),
    )


def exchange(batch: MicroBatch, group: Group) -> Cost:
    """One all-to-all of every row."""
    send = communication.all_to_all_bytes(batch.tokens, batch.model, batch.bytes_per_value)
    return communication.all_to_all(batch.curves, group, send)


def dispatch(batch: MicroBatch, group: Group) -> ModuleCost:
    """Rows gathered in expert order, counts and rows exchanged, arrived rows sorted by local expert."""
    rows = batch.rows * batch.model.hidden
    counts = communication.all_to_all(batch.curves, group, batch.model.experts * INDEX_BYTES)
    sort = batch.stream(2 * rows) if group.size > 1 else Cost()
    moved = batch.stream(2 * rows) + exchange(batch, group) + sort
    return ModuleCost(moved + counts, moved)


def experts(batch: MicroBatch) -> ModuleCost:
    """n_mat grouped GEMMs with the activation between them; the backward has two GEMMs for each of the forward's."""
    model = batch.model
    grouped = batch.curves.operation("grouped_gemm", 2 * batch.rows * model.hidden * model.expert_ffn)
    width = batch.rows * model.expert_ffn
    activation = batch.stream(2 * width)
    gated = model.matrices_per_expert == 3
    product = batch.stream(3 * width) if gated else Cost()
    return ModuleCost(
        grouped * model.matrices_per_expert + activation + product,
        grouped * (2 * model.matrices_per_expert) + batch.stream(3 * width) + product * (2 if gated else 0),
    )


def combine(batch: MicroBatch, group: Group) -> ModuleCost:
    """Rows sorted back and returned, weighted, summed by token and added to the residual."""
    rows, hidden = batch.rows * batch.model.hidden, batch.tokens * batch.model.hidden
    sort = batch.stream(2 * rows) if group.size > 1 else Cost()
    moved = exchange(batch, group) + sort
    return ModuleCost(
        moved + batch.stream(2 * rows, 2) + batch.stream(3 * hidden),
        moved + batch.stream(2 * rows, 3),
    )


def embedding(batch: MicroBatch) -> ModuleCost:
    """One row of the table per token; the backward fills a gradient of the whole table."""
    hidden = batch.tokens * batch.model.hidden
    table = batch.model.embedding_parameters
    return ModuleCost(batch.stream(2 * hidden), batch.stream(2 * hidden) + batch.stream(table, 2))


def head(batch: MicroBatch) -> ModuleCost:
    """Final norm, output projection and cross entropy."""
    gemm = batch.gemm(batch.tokens * flops.head_flops(batch.model))
    logits = batch.tokens * batch.model.vocab
    loss = ModuleCost(gemm + batch.stream(2 * logits, 2), gemm * 2 + batch.stream(3 * logits))
    return norm(batch) + loss
