"""Consistency rules of a ModelSpec, apart from what an executor can train (see executor.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from piper_hpc.spec.problem import Problem

if TYPE_CHECKING:
    from piper_hpc.spec.model import ModelSpec

CHOICES = {
    "attention": ("gqa", "mla"),
    "window_kind": ("sliding", "chunked"),
    "norm": ("rms", "layer", "layer_no_bias"),
    "qk_norm": ("none", "head", "full", "l2"),
    "matrices_per_expert": (3, 2),
    "dense_matrices": (3, 2),
    "counting": ("all", "paper"),
    "activation": ("auto", "silu", "gelu", "gelu_tanh"),
    "router_score": ("softmax", "sigmoid", "sparsemixer"),
    "router_aux": ("sequence", "global_batch"),
}
POSITIVE = (
    *("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "moe_every", "norms_per_layer"),
    *("rope_theta", "rope_fraction", "routed_scale"),
)
NOT_NEGATIVE = (
    *("experts", "top_k", "expert_ffn", "dense_first", "dense_ffn", "dense_residual_ffn"),
    *("shared_experts", "shared_expert_ffn", "expert_groups", "groups_per_token"),
    *("q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim", "v_head_dim"),
    *("sliding_window", "full_attention_every", "positions", "mtp_layers", "encoder_parameters"),
    *("nope_every", "temperature_floor", "temperature_scale", "clip_qkv", "swiglu_limit", "selection_bias_rate"),
    *("router_aux_coef", "router_z_coef"),
)


def broken_rules(spec: ModelSpec) -> list[Problem]:
    """Everything that is wrong with a model: first each value by itself, and where those are fine, together."""
    alone = list(_alone(spec))
    return alone or [*_attention(spec), *_feed_forward(spec), *_routing(spec)]


def _problem(spec: ModelSpec, key: str, rule: str, works: object) -> Problem:
    return Problem(f"model.{key}", getattr(spec, key), rule, f"model.{key}={works}")


def _alone(spec: ModelSpec) -> Iterator[Problem]:
    for key in POSITIVE:
        if not getattr(spec, key) > 0:
            yield _problem(spec, key, "must be greater than 0", 2 if key == "head_dim" else 1)
    for key in NOT_NEGATIVE:
        if not getattr(spec, key) >= 0:
            yield _problem(spec, key, "must not be negative", 0)
    for key, allowed in CHOICES.items():
        if getattr(spec, key) not in allowed:
            yield _problem(spec, key, f"must be one of {', '.join(map(str, allowed))}", allowed[0])


def _attention(spec: ModelSpec) -> Iterator[Problem]:
    if spec.attention == "gqa":
        if spec.heads % spec.kv_heads:
            yield _problem(spec, "kv_heads", f"must divide model.heads = {spec.heads}", spec.heads)
        for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_dim", "qk_rope_dim", "v_head_dim"):
            if getattr(spec, key):
                yield _problem(spec, key, "is a fact of model.attention=mla, not of gqa", 0)
    else:
        for key, works in (("kv_lora_rank", 512), ("qk_nope_dim", 128), ("v_head_dim", 128)):
            if not getattr(spec, key):
                yield _problem(spec, key, "must be greater than 0 where model.attention = mla", works)
        if spec.kv_heads != spec.heads:
            rule = f"must equal model.heads = {spec.heads} where model.attention = mla"
            yield _problem(spec, "kv_heads", rule, spec.heads)
        width = spec.qk_nope_dim + spec.qk_rope_dim
        if spec.head_dim != width:
            rule = f"must be qk_nope_dim + qk_rope_dim = {width} where model.attention = mla"
            yield _problem(spec, "head_dim", rule, width)
        if spec.qk_norm != "none":
            yield _problem(spec, "qk_norm", "MLA norms its latents instead", "none")
    if spec.rope_fraction > 1:
        yield _problem(spec, "rope_fraction", "is a share of a head's width: must be at most 1", 1)
    if spec.full_attention_every and not spec.sliding_window:
        rule = "says which layers see all, so that the others need a window: model.sliding_window must be given"
        yield _problem(spec, "full_attention_every", rule, 0)


def _feed_forward(spec: ModelSpec) -> Iterator[Problem]:
    if spec.dense_first > spec.layers:
        works = spec.layers - 1 if spec.experts else 0
        yield _problem(spec, "dense_first", f"must be at most model.layers = {spec.layers}", works)
        return
    if spec.experts and not spec.moe_layers:
        rule = f"leaves none of the {spec.layers} layers with experts; a dense model has model.experts=0"
        yield _problem(spec, "moe_every", rule, 1 if spec.dense_first < spec.layers else "1 model.dense_first=0")
    if spec.dense_layers and not spec.dense_ffn:
        rule = f"is the width of the {spec.dense_layers} dense feed-forwards: must be greater than 0"
        yield _problem(spec, "dense_ffn", rule, 4 * spec.hidden)
    if not spec.experts:
        for key in ("top_k", "expert_ffn", "shared_experts", "dense_residual_ffn", "dense_first", "expert_groups"):
            if getattr(spec, key):
                yield _problem(spec, key, "must be 0 in a dense model (model.experts = 0)", 0)
    if bool(spec.shared_experts) != bool(spec.shared_expert_ffn):
        rule = f"is the width of each of the {spec.shared_experts} shared experts"
        yield _problem(spec, "shared_expert_ffn", rule, (spec.expert_ffn or spec.hidden) if spec.shared_experts else 0)
    if spec.swiglu_limit and spec.experts and spec.matrices_per_expert != 3:
        yield _problem(spec, "swiglu_limit", "clamps a gate: needs model.matrices_per_expert=3", 0)
    if spec.swiglu_limit and (spec.dense_layers or spec.dense_residual_ffn) and spec.dense_matrices != 3:
        yield _problem(spec, "swiglu_limit", "clamps a gate: needs model.dense_matrices=3", 0)
    if spec.shared_expert_gate and not spec.shared_experts:
        yield _problem(spec, "shared_expert_gate", "needs model.shared_experts of at least 1", "false")


def _routing(spec: ModelSpec) -> Iterator[Problem]:
    if not spec.experts:
        return
    if spec.top_k > spec.experts:
        rule = f"a token cannot go to more than model.experts = {spec.experts} experts"
        yield _problem(spec, "top_k", rule, spec.experts)
    for key, works in (("top_k", 1), ("expert_ffn", 4 * spec.hidden)):
        if not getattr(spec, key):
            yield _problem(spec, key, f"must be greater than 0 where model.experts = {spec.experts}", works)
    if spec.expert_groups:
        if spec.experts % spec.expert_groups:
            yield _problem(spec, "expert_groups", f"must divide model.experts = {spec.experts}", 1)
        elif not 0 < spec.groups_per_token <= spec.expert_groups:
            rule = f"must lie between 1 and model.expert_groups = {spec.expert_groups}"
            yield _problem(spec, "groups_per_token", rule, spec.expert_groups)
        elif spec.top_k > spec.groups_per_token * (spec.experts // spec.expert_groups):
            rule = f"too few groups for model.top_k = {spec.top_k} experts"
            yield _problem(spec, "groups_per_token", rule, spec.expert_groups)
