"""What is trained: the facts that decide parameters, FLOPs and bytes of a Mixture-of-Experts transformer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of attention and feed-forward layers, each feed-forward dense or a Mixture of Experts.

    Names follow Table II of arXiv 2605.05049: hidden = d, heads = H, experts = E, top_k = k, expert_ffn = f,
    matrices_per_expert = n_mat (3 for SwiGLU, 2 for an ungated expert), layers = L. `experts = 0` is a dense model.

    attention: `gqa` (MHA where kv_heads = heads) or `mla` (low-rank query and key-value; q_lora_rank = 0 keeps a full
    query; qk_nope_dim + qk_rope_dim is the width of a query head, v_head_dim that of a value head).
    sliding_window: tokens a query sees, 0 for all; where full_attention_every = n > 0, every n-th layer sees all.
    dense_first: leading layers with a dense feed-forward; moe_every: of the rest every n-th layer has experts.
    dense_residual_ffn: width of a dense feed-forward beside the experts of every MoE layer (Arctic).
    expert_groups, groups_per_token: group-limited routing, 0 where a token may go anywhere.
    positions: learned position embeddings, 0 for none; mtp_layers: multi-token-prediction modules behind the last layer.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_ffn: int
    vocab: int
    matrices_per_expert: int = 3
    attention: str = "gqa"
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_dim: int = 0
    qk_rope_dim: int = 0
    v_head_dim: int = 0
    sliding_window: int = 0
    full_attention_every: int = 0
    dense_first: int = 0
    moe_every: int = 1
    dense_ffn: int = 0
    dense_matrices: int = 3
    dense_residual_ffn: int = 0
    shared_experts: int = 0
    shared_expert_ffn: int = 0
    shared_expert_gate: bool = False
    expert_groups: int = 0
    groups_per_token: int = 0
    tied_embeddings: bool = False
    positions: int = 0
    mtp_layers: int = 0
    norm: str = "rms"
    qk_norm: str = "none"
    attention_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    router_bias: bool = False
    attention_sinks: bool = False
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    router_aux_coef: float = 0.01

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.kv_heads * self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's Q, K, V and output projections (4 d^2 for MHA with H d_h = d)."""
        return self.hidden * (2 * self.q_dim + 2 * self.kv_dim)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert: n_mat d f."""
        return self.matrices_per_expert * self.hidden * self.expert_ffn

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's router: d E."""
        return self.hidden * self.experts

    @property
    def norm_parameters(self) -> int:
        """Parameters of one layer's two RMSNorms."""
        return 2 * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Parameters of one whole layer with all its experts."""
        return (
            self.attention_parameters
            + self.router_parameters
            + self.norm_parameters
            + self.experts * self.expert_parameters
        )

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, V d. The output head, untied, has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters: layers, embedding, untied head and the final norm."""
        return self.layers * self.layer_parameters + 2 * self.embedding_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: as `parameters`, with top_k of the experts."""
        idle = (self.experts - self.top_k) * self.expert_parameters
        return self.parameters - self.layers * idle
