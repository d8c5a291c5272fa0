"""What is trained: the facts that decide parameters, FLOPs and bytes of a Mixture-of-Experts transformer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of `layers` equal layers, each grouped-query attention followed by routed experts.

    Names follow Table II of arXiv 2605.05049: hidden = d, heads = H, experts = E, top_k = k, expert_ffn = f,
    matrices_per_expert = n_mat (3 for SwiGLU, 2 for an ungated expert), layers = L.
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
