"""Seconds that kernels take in every module, for one micro-batch on one rank; messages are in communication.py.

Counted for fused kernels: a norm, a rotation, an activation reads and writes its rows once. `Times` has forward and
both halves of the backward; what a recompute choice adds is in the backward.
"""

from __future__ import annotations

import numpy as np

from piper_hpc.resource_model.analytical.device import Device, Times
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.flops import keys_seen
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Execution

NORM_PASSES, RESIDUAL_PASSES, DROPOUT_PASSES = (2, 3), (3, 3), (0.5, 0.5)
"""Reads and writes per value, (forward, backward); a dropout's mask is one byte a value."""

ROTARY_PASSES = (2, 2)
GATED_PASSES, PLAIN_PASSES = (3, 5), (2, 3)
"""Per value of the activation's output: a gated one reads two."""

SCORE_PASSES = (5.5, 9.0)
"""Stored scores: products write and read them, softmax and dropout read and write them, masks are half as wide."""

FUSED_LOSS_PASSES, LOSS_PASSES = (2, 2), (12, 8)
"""Per logit in units of an activation value: one kernel each way, or casts, maximum, exponentials and sums in fp32."""

ROUTER_PASSES = (12, 12)
"""Per routing logit in units of an activation value: scores, top-k, map and statistics in fp32."""

PERMUTE_PASSES, UNPERMUTE_PASSES, SORT_PASSES = (2, 3), (5, 8), (2, 2)
"""Per value of a row, as Megatron-LM does it without its permute fusion: gather; product with the weights and a
scattered sum; their backwards with the weights' gradients; and the sort of chunks by expert."""

FLASH_BACKWARD_FLOPS = 2.5
"""FLOPs of flash attention's backward over its forward's: five products against two (arXiv 2307.08691)."""


def norm(device: Device, shapes: Shapes) -> Times:
    """One norm of the tokens that are not split by tensor parallelism."""
    return device.streamed(shapes.local_tokens * shapes.model.hidden, *NORM_PASSES)


def residual(device: Device, shapes: Shapes, execution: Execution) -> Times:
    """The sum that ends a block, with its dropout."""
    values = shapes.local_tokens * shapes.model.hidden
    masked = device.streamed(values, *DROPOUT_PASSES) if execution.dropout else Times()
    return device.streamed(values, *RESIDUAL_PASSES) + masked


def core_attention(device: Device, shapes: Shapes, execution: Execution, window: int) -> Times:
    """Scores, softmax and their product with the values: FLOPs 2 tokens keys_seen (q_dim + v_dim) / tp in the forward.

    With flash attention at its own share of the peak. Without, products of [sequence, sequence, head_dim] by head, and
    SCORE_PASSES over the [tokens, sequence] scores of each head. window: tokens a query sees, 0 for all.
    """
    model, layout = shapes.model, shapes.layout
    efficiency = device.accelerator.efficiency
    width = (model.q_dim + model.v_dim) / layout.tp
    if execution.flash:
        flops = 2 * shapes.tokens * keys_seen(shapes.workload.sequence, window, model.window_kind) * width
        # FP8 recipes keep attention in 16 bits.
        dtype = "bfloat16" if device.recipe.gemm_dtype == "float8" else device.recipe.gemm_dtype
        rate = device.accelerator.peak_flops[dtype]
        core = Times(
            flops / (efficiency.attention_forward * rate),
            FLASH_BACKWARD_FLOPS * flops / (efficiency.attention_backward * rate),
        )
        return core.with_recompute(layout.recomputed.attention)
    # Stored scores are computed whole: the mask comes after the product.
    square = shapes.tokens * shapes.workload.sequence
    heads, sequence = shapes.tokens / shapes.workload.sequence * model.heads / layout.tp, shapes.workload.sequence
    products = [
        device.gemm_s(sequence, sequence, width, 0.0, efficiency.gemm, heads)
        for width in (model.head_dim, model.v_head_dim or model.head_dim)
    ]
    stored = device.streamed(square * model.heads / layout.tp, *SCORE_PASSES)
    core = Times(sum(products) + stored.forward, 2 * sum(products) + stored.input_grad)
    return core.with_recompute(layout.recomputed.attention)


def projections(device: Device, shapes: Shapes) -> Times:
    """Query, key, value and output projections; MLA down-projections (arXiv 2405.04434) are not split over tp."""
    model, tp, tokens = shapes.model, shapes.layout.tp, shapes.tokens
    out = device.linear(tokens, model.v_dim / tp, model.hidden)
    if model.attention == "gqa":
        heads = model.q_dim / tp + 2 * shapes.kv_heads * model.head_dim
        return device.linear(tokens, model.hidden, heads) + out
    latent = model.kv_lora_rank + model.qk_rope_dim
    down = device.linear(shapes.local_tokens, model.hidden, latent + model.q_lora_rank)
    keys_and_values = (model.heads * model.qk_nope_dim + model.v_dim) / tp
    query = device.linear(tokens, model.q_lora_rank or model.hidden, model.q_dim / tp)
    up = query + device.linear(tokens, model.kv_lora_rank, keys_and_values)
    inner = device.streamed(shapes.local_tokens * (model.q_lora_rank + latent), *NORM_PASSES)
    return down + inner + up.with_recompute(shapes.layout.recomputed.mla_up) + out


def attention(device: Device, shapes: Shapes, execution: Execution, window: int) -> Times:
    """Norm, projections, rotation, scores, residual."""
    model, recompute = shapes.model, shapes.layout.recomputed
    kv_width = shapes.kv_heads * model.head_dim if model.attention == "gqa" else model.qk_rope_dim
    rotated = shapes.tokens * (model.q_dim / shapes.layout.tp + kv_width)
    rotary = device.streamed(rotated if not model.positions else 0.0, *ROTARY_PASSES)
    return (
        norm(device, shapes).with_recompute(recompute.norm)
        + projections(device, shapes)
        + rotary
        + core_attention(device, shapes, execution, window)
        + residual(device, shapes, execution)
    )


def feed_forward(
    device: Device, shapes: Shapes, *, rows: Number, width: Number, matrices: int, groups: Number = 1.0
) -> Times:
    """An MLP on [rows, hidden], `width` wide on this rank: 2 products, or 3 with a gate (SwiGLU, arXiv 2002.05202)."""
    gated = matrices == 3
    hidden = shapes.model.hidden
    first = device.linear(rows, hidden, (2 if gated else 1) * width, groups)
    inner = device.streamed(rows * width, *(GATED_PASSES if gated else PLAIN_PASSES))
    second = device.linear(rows, width, hidden, groups)
    return first + inner.with_recompute(shapes.layout.recomputed.activation) + second


def dense(device: Device, shapes: Shapes, execution: Execution) -> Times:
    """Norm, dense feed-forward, residual."""
    model = shapes.model
    inner = feed_forward(
        device,
        shapes,
        rows=shapes.tokens,
        width=model.dense_ffn / shapes.layout.tp,
        matrices=model.dense_matrices,
    )
    recompute = shapes.layout.recomputed.norm
    return norm(device, shapes).with_recompute(recompute) + inner + residual(device, shapes, execution)


def router(device: Device, shapes: Shapes) -> Times:
    """Norm, gate product [routed_tokens, hidden] x [hidden, experts], softmax and top-k over the routing logits."""
    model = shapes.model
    gate = device.linear(shapes.routed_tokens, model.hidden, model.experts)
    chosen = device.streamed(shapes.routed_tokens * model.experts, *ROUTER_PASSES)
    recompute = shapes.layout.recomputed.norm
    return norm(device, shapes).with_recompute(recompute) + gate + chosen


def permute(device: Device, shapes: Shapes) -> Times:
    """Megatron's permute: [sent_rows, hidden] gathered from tokens before dispatch, and sorted by expert on arrival."""
    return device.streamed(shapes.sent_rows * shapes.model.hidden, *PERMUTE_PASSES) + _sorted(device, shapes)


def unpermute(device: Device, shapes: Shapes) -> Times:
    """Megatron's unpermute: [sent_rows, hidden] put back into their order after combine, weighted, summed by token."""
    return device.streamed(shapes.sent_rows * shapes.model.hidden, *UNPERMUTE_PASSES) + _sorted(device, shapes)


def _sorted(device: Device, shapes: Shapes) -> Times:
    rows = np.where(shapes.experts_per_rank > 1, shapes.busiest_rows, 0.0)
    return device.streamed(rows * shapes.model.hidden, *SORT_PASSES)


def experts(device: Device, shapes: Shapes) -> Times:
    """The routed experts of the most loaded rank."""
    model = shapes.model
    return feed_forward(
        device,
        shapes,
        rows=shapes.busiest_rows,
        width=model.expert_ffn / shapes.layout.etp,
        matrices=model.matrices_per_expert,
        groups=np.maximum(shapes.experts_per_rank, 1.0),
    )


def shared(device: Device, shapes: Shapes) -> Times:
    """Shared experts and the dense feed-forward beside routed ones; they see every token."""
    model = shapes.model
    if not model.dense_width:
        return Times()
    return feed_forward(
        device,
        shapes,
        rows=shapes.tokens,
        width=model.dense_width / shapes.layout.tp,
        matrices=model.matrices_per_expert,
    )


def embedding(device: Device, shapes: Shapes) -> Times:
    """Embedding lookup of [tokens, hidden]; the backward adds rows to a gradient of the table that is written whole."""
    values = shapes.tokens * shapes.model.hidden
    table = shapes.model.embedding_parameters / shapes.layout.tp
    looked_up = device.streamed(values, 2, 2)
    return looked_up + Times(weight_grad=device.stream_s(2 * table * device.recipe.gradient_bytes))


def head(device: Device, shapes: Shapes, execution: Execution) -> Times:
    """Final norm, output projection [tokens, hidden] x [hidden, vocab / tp], cross entropy over the logits."""
    vocab = shapes.model.vocab / shapes.layout.tp
    passes = FUSED_LOSS_PASSES if execution.fused_loss else LOSS_PASSES
    return (
        norm(device, shapes)
        + device.linear(shapes.tokens, shapes.model.hidden, vocab)
        + device.streamed(shapes.tokens * vocab, *passes)
    )
