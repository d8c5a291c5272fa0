"""A model's sizes as Megatron-LM's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from piper_hpc.spec import ModelSpec, Problem

Arguments = dict[str, Any]
"""Name without dashes -> value; True for an argument without one."""


def problems(model: ModelSpec) -> Iterator[Problem]:
    """What of a model changes its work or its parameters, and has no argument."""
    missing = "Megatron-LM has no argument for it"
    if model.sliding_window and model.window_kind != "sliding":
        yield Problem("model.window_kind", model.window_kind, missing, "model.window_kind=sliding")
    if model.dense_residual_ffn:
        yield Problem("model.dense_residual_ffn", model.dense_residual_ffn, missing, "model.dense_residual_ffn=0")
    if model.encoder_parameters:
        yield Problem("model.encoder_parameters", model.encoder_parameters, missing, "model.encoder_parameters=0")
    if model.moe_layers and model.dense_layers and model.dense_matrices != model.matrices_per_expert:
        rule = f"must be that of an expert, {model.matrices_per_expert}: Megatron-LM has one --swiglu for both"
        works = f"model.dense_matrices={model.matrices_per_expert}"
        yield Problem("model.dense_matrices", model.dense_matrices, rule, works)


def notes(model: ModelSpec) -> Iterator[str]:
    """Vectors of a model that have no argument: next to nothing in time and memory, but of the model."""
    biases = {"output_bias": model.output_bias, "ffn_bias": model.ffn_bias}
    if any(biases.values()) and not _all_biases(model):
        named = ", ".join(f"model.{name}=true" for name, has in biases.items() if has)
        yield f"{named}: --disable-bias-linear is for all projections or none."
    if model.attention_bias and model.attention == "mla":
        yield "model.attention_bias=true: latent attention has no --add-qkv-bias."
    if model.qk_norm == "full":
        yield "model.qk_norm=full: norms of query and key over all heads; --qk-layernorm is over one head."
    for name in ("router_bias", "head_bias"):
        if getattr(model, name):
            yield f"model.{name}=true has no argument."
    if model.norm == "layer_no_bias":
        yield "model.norm=layer_no_bias: LayerNorm has biases here."
    if model.norms_per_layer != 2:
        yield f"model.norms_per_layer={model.norms_per_layer}: two here, before attention and before the feed-forward."
    if model.attention == "mla":
        yield "Rotary positions of latent attention are scaled as Megatron-LM does by default (YaRN): see --rope-type."
    if model.rope_theta % 1 and not model.positions:
        yield f"model.rope_theta={model.rope_theta}: --rotary-base takes a whole number."


def arguments(model: ModelSpec, sequence: int) -> Arguments:
    """Its sizes. sequence: tokens, the positions that it needs at least."""
    gated = (model.matrices_per_expert if model.moe_layers else model.dense_matrices) == 3
    given: Arguments = {
        "num-layers": model.layers,
        "hidden-size": model.hidden,
        "ffn-hidden-size": model.dense_ffn or model.expert_ffn,
        "num-attention-heads": model.heads,
        **(_latent_attention(model) if model.attention == "mla" else _attention(model)),
        **({"swiglu": True} if gated else {}),
        **({} if _all_biases(model) else {"disable-bias-linear": True}),
        "normalization": "RMSNorm" if model.norm == "rms" else "LayerNorm",
        "norm-epsilon": float(model.norm_eps),
        "max-position-embeddings": max(model.positions, sequence),
        "vocab-size": model.vocab,
        # Predictions are of a model without dropout, which is not Megatron-LM's default.
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    if model.positions:
        given["position-embedding-type"] = "learned_absolute"
    else:
        given |= {"position-embedding-type": "rope", "rotary-base": int(model.rope_theta)}
    if not model.tied_embeddings:
        given["untie-embeddings-and-output-weights"] = True
    if model.mtp_layers:
        given["mtp-num-layers"] = model.mtp_layers
    return given | (_experts(model) if model.moe_layers else {})


def _all_biases(model: ModelSpec) -> bool:
    return model.attention_bias and model.output_bias and model.ffn_bias


def _attention(model: ModelSpec) -> Arguments:
    given: Arguments = {"kv-channels": model.head_dim}
    if model.kv_heads != model.heads:
        given |= {"group-query-attention": True, "num-query-groups": model.kv_heads}
    if model.attention_bias and not _all_biases(model):
        given["add-qkv-bias"] = True
    if model.qk_norm == "head":
        given["qk-layernorm"] = True
    if model.qk_norm == "l2":
        given["qk-l2-norm"] = True
    if model.sliding_window:
        # Tokens before and after a query's own.
        given["window-size"] = f"{model.sliding_window - 1},0"
        if model.full_attention_every:
            given["window-attn-skip-freq"] = model.full_attention_every
    if model.attention_sinks:
        given["softmax-type"] = "learnable"
    return given


def _latent_attention(model: ModelSpec) -> Arguments:
    query = {"q-lora-rank": model.q_lora_rank} if model.q_lora_rank else {}
    return {
        "multi-latent-attention": True,
        **query,
        "kv-lora-rank": model.kv_lora_rank,
        "qk-head-dim": model.qk_nope_dim,
        "qk-pos-emb-head-dim": model.qk_rope_dim,
        "v-head-dim": model.v_head_dim,
        "qk-layernorm": True,  # of the low-rank query and key-value
    }


def _experts(model: ModelSpec) -> Arguments:
    given: Arguments = {
        "num-experts": model.experts,
        "moe-ffn-hidden-size": model.expert_ffn,
        "moe-router-topk": model.top_k,
        "moe-aux-loss-coeff": float(model.router_aux_coef),
        "moe-grouped-gemm": True,
    }
    if model.dense_layers:
        kinds = [int(model.is_moe(layer)) for layer in range(model.layers)]
        runs = [f"[{kind}]*{len(list(alike))}" for kind, alike in groupby(kinds)]
        given["moe-layer-freq"] = f"({'+'.join(runs)})"
    if model.shared_experts:
        given["moe-shared-expert-intermediate-size"] = model.shared_experts * model.shared_expert_ffn
    if model.shared_expert_gate:
        given["moe-shared-expert-gate"] = True
    if model.expert_groups:
        given |= {"moe-router-num-groups": model.expert_groups, "moe-router-group-topk": model.groups_per_token}
    return given
