"""Seconds of one layer's attention for one micro-batch, counted from the modules as torch runs them eagerly."""

from __future__ import annotations

from piper_hpc.resource_model import flops
from piper_hpc.resource_model.eager.activations import MOE, SINK_WIDTH
from piper_hpc.resource_model.eager.compute import HOST_OPERATIONS, MicroBatch, ModuleCost, norm, sum_modules
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.spec import LayerKind


def attention(batch: MicroBatch, kind: LayerKind = MOE) -> ModuleCost:
    """Norm, projections, RoPE (arXiv 2104.09864), causal attention, output projection, residual add."""
    model, h = batch.model, batch.hidden
    q, kv, heads = batch.tokens * model.q_dim, batch.tokens * model.kv_dim, batch.tokens * model.v_dim
    latent = model.attention == "mla"
    forward = scores_forward(batch, kind) + batch.stream((2 * heads, 1), (3 * h, 1))
    backward = batch.curves.operation("attention_backward", score_work(batch, kind))
    backward += batch.stream((2 * heads, 1), (2 * kv, 1), (3 * h, 3))
    biases = (q + 2 * kv) * model.attention_bias + h * model.output_bias
    return sum_modules(
        norm(batch),
        *(_latent_projections(batch) if latent else _projections(batch, kind)),
        batch.linear(model.v_dim, model.hidden),
        ModuleCost(forward, backward + batch.stream((biases, 1))),
        batch.host(HOST_OPERATIONS["latent_attention" if latent else "attention"]),
    )


def _projections(batch: MicroBatch, kind: LayerKind) -> list[ModuleCost]:
    model = batch.model
    q, kv = batch.tokens * model.q_dim, batch.tokens * model.kv_dim
    parts = [batch.linear(model.hidden, model.q_dim), batch.linear(model.hidden, model.kv_dim) * 2]
    if kind.positions:
        parts += [rotary(batch, model.q_dim, model.rope_fraction), rotary(batch, model.kv_dim, model.rope_fraction)]
    if model.qk_norm in ("head", "full") or (model.qk_norm == "l2" and kind.positions):
        parts += [norm(batch, model.q_dim), norm(batch, model.kv_dim)]
    if model.clip_qkv:
        clipped = batch.stream((2 * (q + 2 * kv), 1))
        parts.append(ModuleCost(clipped, clipped * 2))
    if model.attention_sinks:  # all three are written once more, wider
        widened = batch.stream((2 * q, 1), (2 * kv, 2))
        parts.append(ModuleCost(widened, widened))
    if model.temperature_floor and not kind.positions:
        grown = batch.stream((2 * q, 1))
        parts.append(ModuleCost(grown, grown))
    return parts


def _latent_projections(batch: MicroBatch) -> list[ModuleCost]:
    """MLA's low-rank pairs (arXiv 2405.04434 section 2.1), the turned parts, and heads put together from both."""
    model, tokens = batch.model, batch.tokens
    q = tokens * model.q_dim
    parts = [
        batch.linear(model.hidden, model.kv_lora_rank + model.qk_rope_dim),
        norm(batch, model.kv_lora_rank),
        batch.linear(model.kv_lora_rank, model.heads * model.qk_nope_dim + model.v_dim),
        rotary(batch, model.heads * model.qk_rope_dim),
        rotary(batch, model.qk_rope_dim),
    ]
    if model.q_lora_rank:
        parts += [
            batch.linear(model.hidden, model.q_lora_rank),
            norm(batch, model.q_lora_rank),
            batch.linear(model.q_lora_rank, model.q_dim),
        ]
    else:
        parts.append(batch.linear(model.hidden, model.q_dim))
    joined = batch.stream((2 * q, 3 if model.v_head_dim < model.head_dim else 2))
    return [*parts, ModuleCost(joined, joined)]


def rotary(batch: MicroBatch, width: int, fraction: float = 1.0) -> ModuleCost:
    """RoPE on heads of `width` in all: four half products, two sums, one concatenation; signs in the backward.

    fraction: leading share of every head that is turned; the concatenation takes the rest as it is.
    """
    whole, w = batch.tokens * width, fraction * batch.tokens * width
    shared = batch.stream((w, 4), (2 * whole, 1), (1.5 * w, 2))
    return ModuleCost(shared, shared + batch.stream((w, 1)))


def scores_forward(batch: MicroBatch, kind: LayerKind = MOE) -> Cost:
    """Scores, softmax and their product with the values, one kernel."""
    return batch.curves.operation("attention_forward", score_work(batch, kind))


def score_work(batch: MicroBatch, kind: LayerKind = MOE) -> float:
    """FLOPs of the kernel: those of plain causality, or where windows or sinks need a mask, which the kernel computes
    all scores for, twice as many. Values as narrow as to need padding count as wide as queries."""
    model = batch.model
    per_token = flops.score_flops(model, batch.sequence)
    if model.attention == "mla" and model.v_head_dim < model.head_dim:
        per_token *= 2 * model.q_dim / (model.q_dim + model.v_dim)
    if model.attention_sinks:
        per_token *= 1 + SINK_WIDTH / model.head_dim
    masked = model.attention_sinks or 0 < kind.window < batch.sequence
    return batch.tokens * per_token * (2 if masked else 1)
