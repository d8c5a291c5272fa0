"""Bytes of one rank by kind and stage, as frameworks with fused kernels keep them.

Per token and layer this is Korthikanti et al. (arXiv 2205.05198, section 4: 34 s b h + 5 a s^2 b for a GPT layer with
stored scores) with the module list of today's layers: gated experts, latent attention, flash attention.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Degrees, Execution, Recompute

FP32_BYTES = 4
LOSS_BYTES = {True: 2, False: 4 + 4}
"""Per logit beside the logit itself: its gradient in one fused kernel, or an fp32 copy and its softmax."""


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: what tensor parallelism or nothing shards (dense), and its share of the experts."""

    dense: Number
    experts: Number = 0.0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)

    def __mul__(self, count: Number) -> Parameters:
        return Parameters(self.dense * count, self.experts * count)


def layer_parameters(shapes: Shapes, *, moe: bool) -> Parameters:
    """One layer on one rank: matrices split over tp (latent down-projections, router and norms are not)."""
    model, layout = shapes.model, shapes.layout
    parts = model.parameters_of(moe=moe)
    copied: Number = parts.norms + parts.router
    if model.attention == "gqa":
        kv = 2 * model.hidden * model.head_dim * shapes.kv_heads
        split = parts.attention - 2 * model.hidden * model.kv_dim + parts.ffn
        copied = copied + kv
    else:
        latent = model.hidden * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_dim)
        split = parts.attention - latent + parts.ffn
        copied = copied + latent
    return Parameters(split / layout.tp + copied, parts.experts / (layout.ep * layout.etp))


def end_parameters(shapes: Shapes, *, first: bool, last: bool) -> Parameters:
    """Embedding on the first stage, final norm and head on the last; a tied head is a copy where stages differ."""
    model = shapes.model
    table = model.embedding_parameters + (model.position_parameters if first else 0)
    own_head = last and not (first and model.tied_embeddings)
    return Parameters((first * table + own_head * model.embedding_parameters) / shapes.layout.tp + last * model.hidden)


def state_bytes(shapes: Shapes, parameters: Parameters) -> dict[str, Number]:
    """Bytes of weights, gradients and optimizer states; ZeRO (arXiv 1910.02054) 1, 2, 3 shards the last, last two, all.

    What is dense is sharded over every rank that has the same (dense data parallel and context parallel ranks),
    experts over their own replicas.
    """
    layout, recipe = shapes.layout, shapes.workload.recipe
    zero = np.asarray(layout.zero)

    def kept(bytes_per_parameter: int, stage: int) -> Number:
        dense_shards = np.where(zero >= stage, layout.dense_dp * layout.cp, 1)
        expert_shards = np.where(zero >= stage, layout.dp, 1)
        return bytes_per_parameter * (parameters.dense / dense_shards + parameters.experts / expert_shards)

    return {
        "parameters": kept(recipe.weight_bytes, 3),
        "gradients": kept(recipe.gradient_bytes, 2),
        "optimizer": kept(recipe.master_bytes + recipe.moment_bytes, 1),
    }


def attention_bytes(shapes: Shapes, execution: Execution) -> Number:
    """Bytes that autograd keeps of one layer's attention for one micro-batch, after section 4.1 of arXiv 2205.05198.

    Of each of [tokens / tp, hidden]: the norm's input and output; of [tokens, heads]: query, keys, values and output;
    with flash attention one fp32 log-sum by token and head, else the stored [tokens, sequence] scores of every head:
    softmax and dropout output, and one byte of mask.
    """
    model, layout, value = shapes.model, shapes.layout, shapes.value_bytes
    recompute = layout.recomputed
    hidden = shapes.local_tokens * model.hidden
    kept = hidden * (2 - recompute.norm) + hidden * execution.dropout / value
    query, out = model.q_dim / layout.tp, model.v_dim / layout.tp
    if model.attention == "gqa":
        heads = query + 2 * shapes.kv_heads * model.head_dim
    else:
        keys = query
        heads = (query + keys + out) * (1 - recompute.mla_up)
        latents = 2 * (model.q_lora_rank + model.kv_lora_rank) + model.qk_rope_dim
        kept = kept + shapes.local_tokens * latents
    kept = kept + shapes.tokens * (heads + out)
    if execution.flash:
        return kept * value + shapes.tokens * model.heads / layout.tp * FP32_BYTES
    square = shapes.tokens * shapes.workload.sequence * model.heads / layout.tp
    stored = square * (2 * value + 1) * (1 - recompute.attention)
    return kept * value + stored


def feed_forward_bytes(shapes: Shapes, rows: Number, width: Number, matrices: int) -> Number:
    """Bytes kept of an MLP: [rows, width] outputs of the first product(s) and of the activation, on one rank."""
    products = 2 if matrices == 3 else 1
    return rows * width * (products + 1 - shapes.layout.recomputed.activation) * shapes.value_bytes


def dense_bytes(shapes: Shapes, execution: Execution) -> Number:
    """Bytes that autograd keeps of a dense feed-forward: its norm's input and output, and its inner rows."""
    model, value = shapes.model, shapes.value_bytes
    hidden = shapes.local_tokens * model.hidden * (2 - shapes.layout.recomputed.norm + execution.dropout / value)
    inner = feed_forward_bytes(shapes, shapes.tokens, model.dense_ffn / shapes.layout.tp, model.dense_matrices)
    return hidden * value + inner


def moe_bytes(shapes: Shapes, execution: Execution) -> Number:
    """Bytes that autograd keeps of router, experts and shared experts, on the most loaded rank."""
    model, layout, value = shapes.model, shapes.layout, shapes.value_bytes
    recompute = layout.recomputed
    hidden = shapes.local_tokens * model.hidden * value
    router = shapes.routed_tokens * (model.experts * (FP32_BYTES + 1) + 2 * model.top_k * FP32_BYTES)
    width = model.expert_ffn / layout.etp
    routed = shapes.busiest_rows * model.hidden * value + feed_forward_bytes(
        shapes, shapes.busiest_rows, width, model.matrices_per_expert
    )
    always = feed_forward_bytes(shapes, shapes.tokens, model.dense_width / layout.tp, model.matrices_per_expert)
    return hidden * (2 - recompute.norm) + (router + routed + always) * (1 - recompute.moe)


def layer_bytes(shapes: Shapes, execution: Execution, *, moe: bool) -> Number:
    """Bytes that one layer keeps of one micro-batch; only its input, [local_tokens, hidden], with full recompute."""
    inner = moe_bytes(shapes, execution) if moe else dense_bytes(shapes, execution)
    full = shapes.layout.recomputed.full
    kept = attention_bytes(shapes, execution) + inner
    return (1 - full) * kept + full * shapes.local_tokens * shapes.model.hidden * shapes.value_bytes


def head_bytes(shapes: Shapes, execution: Execution) -> Number:
    """Bytes of the last stage at the loss: the final norm's rows, [tokens, vocab / tp] logits and their gradient."""
    model, value = shapes.model, shapes.value_bytes
    logits = shapes.tokens * model.vocab / shapes.layout.tp
    return 2 * shapes.local_tokens * model.hidden * value + logits * (value + LOSS_BYTES[execution.fused_loss])


def weight_gradient_bytes(shapes: Shapes, execution: Execution, *, dense: bool, moe: bool) -> Number:
    """Bytes of the weight-gradient buffers that Transformer Engine keeps, one for every shape of weight."""
    if not execution.transformer_engine:
        return 0.0
    model, tp, h = shapes.model, shapes.layout.tp, shapes.model.hidden
    out = model.v_dim * h / tp
    if model.attention == "gqa":
        attention = (model.q_dim / tp + 2 * shapes.kv_heads * model.head_dim) * h + out
    else:
        latent = h * (model.q_lora_rank + model.kv_lora_rank + model.qk_rope_dim)
        query = (model.q_lora_rank or h) * model.q_dim / tp
        attention = latent + query + model.kv_lora_rank * (model.heads * model.qk_nope_dim + model.v_dim) / tp + out
    wide = dense * model.dense_matrices * h * model.dense_ffn / tp
    narrow = moe * model.matrices_per_expert * h * (model.dense_width / tp + model.expert_ffn / shapes.layout.etp)
    return (attention + wide + narrow) * shapes.value_bytes


class _WithoutRecompute:
    """A layout without recompute, otherwise the one it wraps."""

    recomputed = Recompute()

    def __init__(self, layout: Degrees) -> None:
        self._layout = layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layout, name)


def backward_bytes(shapes: Shapes, execution: Execution, *, moe: bool) -> Number:
    """Bytes alive for a while inside the last layer's backward: gradients of its inner rows, and what it recomputed."""
    model, layout, value = shapes.model, shapes.layout, shapes.value_bytes
    if moe:
        products = 2 if model.matrices_per_expert == 3 else 1
        inner = (
            shapes.busiest_rows * (products + 1) * model.expert_ffn / layout.etp + shapes.busiest_rows * model.hidden
        )
    else:
        products = 2 if model.dense_matrices == 3 else 1
        inner = shapes.tokens * (products + 1) * model.dense_ffn / layout.tp
    whole = layer_bytes(replace(shapes, layout=cast(Degrees, _WithoutRecompute(layout))), execution, moe=moe)
    return inner * value + whole - layer_bytes(shapes, execution, moe=moe)


def gathered_bytes(shapes: Shapes, layer: Parameters) -> Number:
    """Bytes that ZeRO 3 holds whole: weights of the running and of the prefetched layer, and one layer's gradients."""
    recipe = shapes.workload.recipe
    whole = (layer.dense + layer.experts) * (2 * recipe.weight_bytes + recipe.gradient_bytes)
    return np.where(np.asarray(shapes.layout.zero) >= 3, whole, 0.0)
