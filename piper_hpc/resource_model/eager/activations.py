"""Bytes that autograd keeps of each module of a layer, and leaves between the two halves of a split backward.

Counted from the modules as torch runs them one by one: of every operation what its backward reads, a tensor once. Each
count is held against the live bytes of real steps (tests/resource_model/test_memory.py).
"""

from __future__ import annotations

from piper_hpc.spec import LayerKind, ModelSpec, Recompute

SINK_WIDTH = 8
"""What a head grows by to hold a sink (piper_hpc.model.scores)."""
INDEX_BYTES = 8
"""torch's indices are int64."""
FLOAT32_BYTES = 4
MOE = LayerKind()
NOTHING = Recompute()


def norm_bytes(model: ModelSpec, width: int, value_bytes: int) -> int:
    """Bytes that a norm over `width` keeps of a token, with what it returns, which the next product keeps.

    RMSNorm runs as several operations: its input, the normalised and the scaled row, one root. Of 16-bit numbers input
    and normalised row are kept in float32, and the input itself is not. LayerNorm is one operation.
    """
    if model.norm != "rms":
        return 2 * width * value_bytes + 2 * max(value_bytes, FLOAT32_BYTES)
    return (2 * width + 1) * max(value_bytes, FLOAT32_BYTES) + width * value_bytes


def keeps_input(model: ModelSpec, value_bytes: int) -> bool:
    """Whether a norm keeps its input itself, which another may keep too, and no wider copy of it."""
    return model.norm != "rms" or value_bytes >= FLOAT32_BYTES


def layer_activation_bytes(
    model: ModelSpec,
    tokens: int,
    ep: int,
    value_bytes: int,
    load: float = 1.0,
    recompute: Recompute = NOTHING,
    kind: LayerKind = MOE,
) -> int:
    """Bytes that autograd keeps of one layer, its input included, for `tokens` of one rank.

    load: rows that arrive at this rank's experts over the mean, tokens * top_k; those it sent come back to it.
    Recomputed attention keeps neither its output nor the softmax's sums, a recomputed activation only the products that
    it is made of, a recomputed layer its input alone.
    """
    if recompute.full:
        return tokens * model.hidden * value_bytes
    norms = 2 * norm_bytes(model, model.hidden, value_bytes)
    attention = attention_bytes(model, value_bytes, kind, recompute)
    if not kind.moe:
        inner = inner_values(model, model.dense_ffn, recompute) * value_bytes
        return tokens * (norms + attention + inner)
    beside = beside_bytes(model, value_bytes, recompute)
    routed = router_bytes(model, tokens, value_bytes) + experts_bytes(model, tokens, ep, value_bytes, load, recompute)
    return tokens * (norms + attention + beside) + routed


def attention_bytes(model: ModelSpec, value_bytes: int, kind: LayerKind = MOE, recompute: Recompute = NOTHING) -> int:
    """Bytes kept of a token by the projections, norms, positions and scores of attention."""
    again, wide = bool(recompute.attention), max(value_bytes, FLOAT32_BYTES)
    if model.attention == "mla":
        return _latent_attention_bytes(model, value_bytes, again=again)
    q, kv, heads = model.q_dim, model.kv_dim, model.heads + model.kv_heads
    values, wider = q + 2 * kv, 0  # queries, keys and values as the kernel reads them
    if model.qk_norm in ("head", "full"):
        wider += 2 * (q + kv) + (heads if model.qk_norm == "head" else 2)
    elif model.qk_norm == "l2" and kind.positions:
        wider += q + kv + heads  # there is no scale to multiply by, so that the normalised row is not kept
    if model.clip_qkv:
        values += q + 2 * kv
    values += q  # the heads' outputs, laid out by token
    if not again:
        widened = (model.heads + 2 * model.kv_heads) * SINK_WIDTH if model.attention_sinks else 0
        # Its own output and the softmax's sums. Without positions that output lies by token already.
        own = 0 if not kind.positions and model.qk_norm in ("none", "l2") and not widened else q
        values += widened + own + (model.heads * SINK_WIDTH if widened else 0)
        wider += model.heads
    return values * value_bytes + wider * wide


def _latent_attention_bytes(model: ModelSpec, value_bytes: int, *, again: bool) -> int:
    q, v, rope = model.q_dim, model.v_dim, model.qk_rope_dim
    query = norm_bytes(model, model.q_lora_rank, value_bytes) if model.q_lora_rank else 0
    latent = norm_bytes(model, model.kv_lora_rank, value_bytes)
    if keeps_input(model, value_bytes):
        latent += rope * value_bytes  # the norm's input is a part of the down-projection
    raw_values = model.heads * model.qk_nope_dim + v  # values are a part of the up-projection
    if again:
        return query + latent + (2 * q + v + raw_values) * value_bytes
    kept = q if model.v_head_dim < model.head_dim else raw_values
    return query + latent + (2 * q + v + kept + q) * value_bytes + model.heads * max(value_bytes, FLOAT32_BYTES)


def inner_values(model: ModelSpec, width: int, recompute: Recompute = NOTHING, *, gated: bool | None = None) -> int:
    """Numbers kept of a row by a feed-forward of that inner width, beside its input."""
    gated = model.dense_matrices == 3 if gated is None else gated
    if recompute.activation:
        return (2 if gated else 1) * width
    if model.swiglu_limit:
        return 7 * width  # gate and up before and after their clamps, the sigmoid, the product with it, what goes down
    return (4 if gated else 2) * width


def beside_bytes(model: ModelSpec, value_bytes: int, recompute: Recompute = NOTHING) -> int:
    """Bytes kept of a token by what an MoE layer computes beside its experts: shared experts, a dense residual."""
    kept = 0
    if model.shared_experts:
        gated = model.matrices_per_expert == 3
        inner = inner_values(model, model.shared_experts * model.shared_expert_ffn, recompute, gated=gated)
        kept += (inner + (model.hidden + 1) * model.shared_expert_gate) * value_bytes  # what the gate scales
    if model.dense_residual_ffn:
        kept += norm_bytes(model, model.hidden, value_bytes)
        kept += inner_values(model, model.dense_residual_ffn, recompute) * value_bytes
        # Experts are given the layer's input, which attention's norm keeps already.
        kept -= model.hidden * value_bytes * keeps_input(model, value_bytes)
    return kept


def router_bytes(model: ModelSpec, tokens: int, value_bytes: int) -> int:
    """Bytes kept by the router's scores, choice, weights and losses, and by the weighing of what experts return."""
    wide = max(value_bytes, FLOAT32_BYTES)
    normalised = model.normalised_weights and model.top_k > 1
    scores = model.experts + normalised * (model.top_k + 1)
    scores += model.router_score == "sigmoid"  # their sum, for the losses' shares
    scores += (model.experts + 1) * bool(model.router_z_coef)
    widened = 0
    if model.fp32_gate and value_bytes < FLOAT32_BYTES:
        widened = (tokens + model.experts) * model.hidden * FLOAT32_BYTES
    weights = tokens * model.top_k * value_bytes
    return tokens * (scores * wide + model.top_k * INDEX_BYTES) + weights + widened


def experts_bytes(
    model: ModelSpec, tokens: int, ep: int, value_bytes: int, load: float, recompute: Recompute = NOTHING
) -> int:
    """Bytes kept by experts of their rows, by combine of the copies that it weighs, and by every permutation."""
    rows = tokens * model.top_k
    arrived = round(load * rows)
    inner = inner_values(model, model.expert_ffn, recompute, gated=model.matrices_per_expert == 3)
    indices = 2 * rows + (2 * arrived if ep > 1 else 0) + arrived * model.ffn_bias
    weighed = 0 if model.weighted_input else rows * model.hidden
    return (weighed + arrived * (model.hidden + inner)) * value_bytes + indices * INDEX_BYTES


def split_values(model: ModelSpec, kind: LayerKind = MOE) -> int:
    """Numbers of a token that the backward of a layer's input (I) leaves for that of its weights (W).

    Routed rows are not among them. torch keeps the gradient of what each weight made.
    """
    values = 3 * model.hidden  # of both norms and of the output projection
    if model.attention == "mla":
        values += 2 * model.q_lora_rank + model.q_dim
        values += 2 * model.kv_lora_rank + model.qk_rope_dim + model.heads * model.qk_nope_dim + model.v_dim
    else:
        values += model.q_dim + 2 * model.kv_dim
        values += (model.q_dim + model.kv_dim) * (model.qk_norm in ("head", "full"))
    if not kind.moe:
        return values + model.hidden + (model.dense_matrices - 1) * model.dense_ffn
    values += model.experts
    if model.shared_experts:
        inner = (model.matrices_per_expert - 1) * model.shared_experts * model.shared_expert_ffn
        values += model.hidden + inner + model.shared_expert_gate
    if model.dense_residual_ffn:
        values += 2 * model.hidden + (model.dense_matrices - 1) * model.dense_residual_ffn
    return values
