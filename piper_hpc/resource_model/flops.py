"""Model FLOPs: one closed form by module, with its convention named next to every figure that uses it.

A matrix costs a token 2 FLOPs a parameter; attention scores and the weighted sum of values 2 FLOPs each for every key
that a query sees and every channel of a head. Training is three times the forward; recompute is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from piper_hpc.spec import ModelSpec

TRAINING_OVER_FORWARD = 3
"""A backward does twice the FLOPs of its forward."""


@dataclass(frozen=True)
class Convention:
    """What a printed FLOP figure counts: half of the square of scores by causality, sliding windows, MTP modules."""

    name: str
    causal: bool = True
    windows: bool = True
    mtp: bool = True

    @property
    def text(self) -> str:
        """The convention in words, to stand beside a figure."""
        keys = "keys a query sees: half by causality" if self.causal else "non-causal: every key of the sequence"
        windows = "within its window" if self.windows else "windows ignored"
        mtp = "MTP modules" if self.mtp else "no MTP modules"
        return (
            f"training FLOPs per token, {self.name}: 6 x active matmul parameters (attention projections, dense and "
            f"shared feed-forwards, top-k experts, head, {mtp}; no embedding, router or norms) + 6 x layers x sequence "
            f"x (q_dim + v_dim) x c ({keys}, {windows}); recompute not counted"
        )


CONVENTIONS = {
    each.name: each
    for each in (
        Convention("causal"),
        Convention("noncausal", causal=False),
        Convention("causal_without_mtp", mtp=False),
        Convention("noncausal_without_mtp", causal=False, mtp=False),
        Convention("causal_unwindowed", windows=False),
    )
}
"""By name. They differ by 12 % for DeepSeek-V3: a figure without its convention says little."""

CAUSAL = CONVENTIONS["causal"]
FLOP_CONVENTION = CAUSAL.text
"""What `flops_per_token` counts where no convention is given."""


@dataclass(frozen=True)
class ModuleFlops:
    """FLOPs of one token by module. `dense` is a dense layer's feed-forward, or the dense residual beside experts."""

    projections: float = 0.0
    scores: float = 0.0
    dense: float = 0.0
    shared: float = 0.0
    routed: float = 0.0
    mtp: float = 0.0
    head: float = 0.0

    @property
    def total(self) -> float:
        """All modules together."""
        return sum(getattr(self, module.name) for module in fields(self))

    def __add__(self, other: ModuleFlops) -> ModuleFlops:
        return ModuleFlops(*(getattr(self, m.name) + getattr(other, m.name) for m in fields(self)))

    def __mul__(self, times: float) -> ModuleFlops:
        return ModuleFlops(*(times * getattr(self, m.name) for m in fields(self)))


def keys_seen(sequence: int, window: int = 0, kind: str = "sliding", convention: Convention = CAUSAL) -> float:
    """Mean keys that a query of a sequence attends to.

    Causal: s / 2 without a window; w - w^2 / (2 s) with a sliding window of w < s; w / 2 in chunks of w. Non-causal:
    all s, or all w of the window.
    """
    if not convention.windows or not window or window >= sequence:
        return sequence / 2 if convention.causal else float(sequence)
    if not convention.causal:
        return float(window)
    return window / 2 if kind == "chunked" else window - window**2 / (2 * sequence)


def projection_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of one layer's attention projections; MLA's with their low-rank pairs."""
    return 2 * model.attention_weights


def score_flops(model: ModelSpec, sequence: int, window: int = 0, convention: Convention = CAUSAL) -> float:
    """Forward FLOPs per token of one layer's attention scores and weighted values: 2 keys (q_dim + v_dim).

    Without a window, over b sequences of s tokens and q_dim = v_dim, that is 2 b s^2 q_dim: an `attention_forward`.
    """
    return 2 * keys_seen(sequence, window, model.window_kind, convention) * (model.q_dim + model.v_dim)


def dense_flops(model: ModelSpec, width: int) -> float:
    """Forward FLOPs per token of a dense feed-forward of that width: 2 n_mat d f."""
    return 2 * model.dense_matrices * model.hidden * width


def shared_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of one MoE layer's shared experts (without their gate): 2 n_mat E_s d f."""
    return 2 * model.matrices_per_expert * model.hidden * model.shared_experts * model.shared_expert_ffn


def expert_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of one MoE layer's top-k experts: 2 n_mat k d f."""
    return 2 * model.top_k * model.expert_weights


def head_flops(model: ModelSpec) -> float:
    """Forward FLOPs per token of the output head, tied or not: 2 d V."""
    return 2 * model.embedding_parameters


def layer_flops(
    model: ModelSpec, sequence: int, *, moe: bool, window: int = 0, convention: Convention = CAUSAL
) -> ModuleFlops:
    """Forward FLOPs per token of one layer by module."""
    return ModuleFlops(
        projections=projection_flops(model),
        scores=score_flops(model, sequence, window, convention),
        dense=dense_flops(model, model.dense_residual_ffn if moe else model.dense_ffn),
        shared=shared_flops(model) if moe else 0.0,
        routed=expert_flops(model) if moe else 0.0,
    )


def mtp_flops(model: ModelSpec, sequence: int, convention: Convention = CAUSAL) -> float:
    """Forward FLOPs per token of one MTP module: its 2d x d projection, its layer, and the shared head once more."""
    layer = layer_flops(model, sequence, moe=model.experts > 0, convention=convention)
    return 4 * model.hidden**2 + layer.total + head_flops(model)


def forward_flops(model: ModelSpec, sequence: int, convention: Convention = CAUSAL) -> ModuleFlops:
    """Forward FLOPs of one token through the whole model by module, in sequences of `sequence` tokens."""
    modules = ModuleFlops(
        mtp=model.mtp_layers * mtp_flops(model, sequence, convention) if convention.mtp else 0.0,
        head=head_flops(model),
    )
    for layer, window in enumerate(model.windows):
        modules += layer_flops(model, sequence, moe=model.is_moe(layer), window=window, convention=convention)
    return modules


def flops_per_token(model: ModelSpec, sequence: int, convention: Convention = CAUSAL) -> float:
    """Model FLOPs of one token's training step (forward and backward), `FLOP_CONVENTION` unless another is given.

    Reproduces the published figures of DeepSeek-V3, Qwen3, Kimi K2, GPT-OSS, Llama 3 and others to 0.2 %.
    """
    return float(TRAINING_OVER_FORWARD * forward_flops(model, sequence, convention).total)
