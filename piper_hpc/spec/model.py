"""The model: sizes that decide parameters, FLOPs and bytes of a Mixture-of-Experts transformer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from piper_hpc.spec.model_rules import broken_rules
from piper_hpc.spec.problem import SpecError
from piper_hpc.spec.rope import RopeScaling


class LayerKind(NamedTuple):
    """Layers that compute alike: with experts or without, their attention's window, and whether it has positions."""

    moe: bool = True
    window: int = 0
    positions: bool = True


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one layer by part. `experts` are the routed ones, all of them; `ffn` is every feed-forward that
    each token passes: that of a dense layer, or shared experts (with their gate) and the dense residual."""

    attention: int
    ffn: int
    router: int
    norms: int
    experts: int

    @property
    def replicated(self) -> int:
        """All but the routed experts: what expert parallelism does not spread."""
        return self.attention + self.ffn + self.router + self.norms

    @property
    def total(self) -> int:
        """The whole layer."""
        return self.replicated + self.experts


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of attention and feed-forward layers, each feed-forward dense or a Mixture of Experts.

    Names follow Table II of arXiv 2605.05049: hidden = d, heads = H, experts = E, top_k = k, expert_ffn = f,
    matrices_per_expert = n_mat (3 for SwiGLU, 2 for an ungated expert), layers = L. `experts = 0` is a dense model.
    Facts that contradict one another raise SpecError (a ValueError) with key, value, rule and a value that works.

    attention: `gqa` (MHA where kv_heads = heads) or `mla` (low-rank query and key-value; q_lora_rank = 0 keeps a full
    query; head_dim = qk_nope_dim + qk_rope_dim is the width of a query head, v_head_dim that of a value head).
    sliding_window: tokens a query sees, 0 for all; where full_attention_every = n > 0, every n-th layer sees all.
    window_kind: `sliding`, or `chunked` where a query sees its own chunk of sliding_window tokens (Llama 4).
    dense_first: leading layers with a dense feed-forward; moe_every: of the rest every n-th layer has experts.
    dense_residual_ffn: width of a dense feed-forward beside the experts of every MoE layer (Arctic).
    shared_expert_ffn: width of one shared expert; shared_expert_gate: a d x 1 gate on their output (Qwen2-MoE).
    expert_groups, groups_per_token: group-limited routing, 0 where a token may go anywhere; a group is as good as its
    best expert, or with selection_bias as the sum of its two best.
    router_score: `softmax` over all experts, `sigmoid` of each, or `sparsemixer` (Phi-3.5-MoE); normalised_weights: a
    token's weights are divided by their sum (where it has several); routed_scale: what they are multiplied by.
    selection_bias: added to scores where experts are chosen, never to weights; after each step it moves by
    selection_bias_rate against each expert's load (arXiv 2408.15664). weighted_input: weights scale what experts are
    given, not what they return (Llama 4). fp32_gate: the router's product is computed in float32 whatever the type.
    router_aux: `sequence` (arXiv 2412.19437 Eq 17-20) or `global_batch`, with each expert's share of the step before;
    router_z_coef: weight of the squared log of the sum of the router's exponentials (arXiv 2202.08906 Eq 5).
    activation: `silu`, `gelu`, `gelu_tanh`, or `auto`: SiLU where a feed-forward has a gate, GELU where it has none.
    swiglu_limit: 0, or where gpt-oss clamps: (up + 1) gate sigmoid(1.702 gate), gate at most it, up within it.
    rope_fraction: leading share of a head's width that RoPE turns; rope_interleaved: it turns neighbours (2i, 2i + 1),
    not (i, i + width / 2); nope_every: every n-th layer has no positions, 0 for none (Llama 4), and there queries grow
    by 1 + temperature_scale log(1 + floor(position / temperature_floor)), a floor of 0 for none (arXiv 2501.19399).
    clip_qkv: bound of queries, keys and values, 0 for none.
    positions: learned position embeddings, 0 for none; mtp_layers: multi-token-prediction modules after the last layer.
    norm: `rms`, `layer` or `layer_no_bias`; qk_norm: `none`, `head` (one head's width), `full` (all heads' width) or
    `l2` (no parameters). attention_bias: on query, key, value; output_bias: on the output projection; ffn_bias: on
    every feed-forward; head_bias: on the LM head.
    encoder_parameters: a vision encoder before the decoder, as one number: counted, its FLOPs not modelled.
    counting: `all`, or `paper` where the size in print counts experts and 4 d^2 of attention alone; says what is
    reported as the model's size, never what memory and time are computed from.
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
    window_kind: str = "sliding"
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
    norms_per_layer: int = 2
    qk_norm: str = "none"
    attention_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False
    router_bias: bool = False
    head_bias: bool = False
    attention_sinks: bool = False
    encoder_parameters: int = 0
    counting: str = "all"
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    rope_scaling: RopeScaling | None = None
    nope_every: int = 0
    temperature_floor: int = 0
    temperature_scale: float = 0.1
    clip_qkv: float = 0.0
    activation: str = "auto"
    swiglu_limit: float = 0.0
    norm_eps: float = 1e-5
    router_score: str = "softmax"
    normalised_weights: bool = True
    routed_scale: float = 1.0
    selection_bias: bool = False
    selection_bias_rate: float = 0.001
    weighted_input: bool = False
    fp32_gate: bool = False
    router_aux: str = "sequence"
    router_aux_coef: float = 0.01
    router_z_coef: float = 0.0

    def __post_init__(self) -> None:
        if problems := broken_rules(self):
            raise SpecError(*problems)

    # Widths.

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together; for MLA after the up-projection."""
        return self.kv_heads * self.head_dim

    @property
    def v_dim(self) -> int:
        """Width of what attention hands to its output projection: query heads times the value head's width."""
        return self.heads * (self.v_head_dim or self.head_dim)

    @property
    def dense_width(self) -> int:
        """Width of the feed-forwards in an MoE layer that every token passes: shared experts and dense residual."""
        return self.shared_experts * self.shared_expert_ffn + self.dense_residual_ffn

    # Layers.

    def is_moe(self, layer: int) -> bool:
        """Whether layer 0 .. layers-1 has experts."""
        return self.experts > 0 and layer >= self.dense_first and (layer - self.dense_first + 1) % self.moe_every == 0

    @property
    def moe_layers(self) -> int:
        """How many layers have experts."""
        return (self.layers - self.dense_first) // self.moe_every if self.experts else 0

    @property
    def dense_layers(self) -> int:
        """How many layers have a dense feed-forward only."""
        return self.layers - self.moe_layers

    def window(self, layer: int) -> int:
        """Tokens that a query of this layer sees, 0 where it sees all."""
        sees_all = self.full_attention_every and (layer + 1) % self.full_attention_every == 0
        return 0 if sees_all else self.sliding_window

    def has_positions(self, layer: int) -> bool:
        """Whether this layer turns its queries and keys by position."""
        return not self.nope_every or (layer + 1) % self.nope_every != 0

    def kinds(self, layers: Iterable[int]) -> tuple[tuple[LayerKind, int], ...]:
        """How many of these layers are of each kind."""
        found = Counter(
            LayerKind(self.is_moe(layer), self.window(layer), self.has_positions(layer)) for layer in layers
        )
        return tuple(sorted(found.items()))

    @property
    def rope_dim(self) -> int:
        """How much of a head's width RoPE turns, in pairs; for MLA of the part that it turns at all."""
        width = self.qk_rope_dim if self.attention == "mla" else self.head_dim
        return int(width * self.rope_fraction) // 2 * 2

    @property
    def windows(self) -> tuple[int, ...]:
        """`window` of every layer."""
        return tuple(self.window(layer) for layer in range(self.layers))

    # Parameters of one layer. `_weights` are matrices that a token is multiplied with, two FLOPs a parameter.

    @property
    def attention_weights(self) -> int:
        """Matrices of one layer's attention: Q, K, V and output projections, MLA's with their low-rank pairs."""
        if self.attention == "gqa":
            return self.hidden * (2 * self.q_dim + 2 * self.kv_dim)
        query = self.q_lora_rank * (self.hidden + self.q_dim) if self.q_lora_rank else self.hidden * self.q_dim
        latent = self.hidden * (self.kv_lora_rank + self.qk_rope_dim)
        keys_and_values = self.kv_lora_rank * (self.heads * self.qk_nope_dim + self.v_dim)
        return query + latent + keys_and_values + self.v_dim * self.hidden

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention (4 d^2 for MHA with H d_h = d): matrices, biases, inner norms, sinks."""
        if self.attention == "gqa":
            biased = self.q_dim + 2 * self.kv_dim
            scale = self.norm_width // self.hidden  # a LayerNorm has a bias beside its scale
            inner = scale * {"head": 2 * self.head_dim, "full": self.q_dim + self.kv_dim}.get(self.qk_norm, 0)
        else:
            # The biases are those of the down-projections; a full query, and every up-projection, has none.
            biased = self.q_lora_rank + self.kv_lora_rank + self.qk_rope_dim
            inner = self.q_lora_rank + self.kv_lora_rank
        vectors = self.attention_bias * biased + self.output_bias * self.hidden + self.attention_sinks * self.heads
        return self.attention_weights + inner + vectors

    def _feed_forward(self, width: int, matrices: int) -> int:
        return matrices * self.hidden * width + self.ffn_bias * ((matrices - 1) * width + self.hidden)

    @property
    def expert_weights(self) -> int:
        """Matrices of one expert: n_mat d f."""
        return self.matrices_per_expert * self.hidden * self.expert_ffn

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert: n_mat d f, and biases where it has them."""
        return self._feed_forward(self.expert_ffn, self.matrices_per_expert)

    @property
    def shared_parameters(self) -> int:
        """Parameters of one MoE layer's shared experts with their gate, and of its dense residual."""
        shared = self._feed_forward(self.shared_experts * self.shared_expert_ffn, self.matrices_per_expert)
        residual = self._feed_forward(self.dense_residual_ffn, self.dense_matrices)
        gate = self.hidden * self.shared_expert_gate
        return shared * bool(self.shared_experts) + residual * bool(self.dense_residual_ffn) + gate

    @property
    def dense_parameters(self) -> int:
        """Parameters of one dense layer's feed-forward."""
        return self._feed_forward(self.dense_ffn, self.dense_matrices)

    @property
    def router_parameters(self) -> int:
        """Parameters of one MoE layer's router: d E, and a bias of E where it is trained."""
        return (self.hidden + self.router_bias) * self.experts

    @property
    def norm_width(self) -> int:
        """Parameters of one norm over the hidden width."""
        return self.hidden * (2 if self.norm == "layer" else 1)

    @property
    def norm_parameters(self) -> int:
        """Parameters of one layer's norms over the hidden width."""
        return self.norms_per_layer * self.norm_width

    def parameters_of(self, *, moe: bool) -> LayerParameters:
        """Parameters by part of a layer with experts, or of a dense one."""
        return LayerParameters(
            attention=self.attention_parameters,
            ffn=self.shared_parameters if moe else self.dense_parameters,
            router=self.router_parameters if moe else 0,
            norms=self.norm_parameters,
            experts=self.experts * self.expert_parameters if moe else 0,
        )

    def layer_parameters_of(self, layer: int) -> LayerParameters:
        """Parameters by part of layer 0 .. layers-1."""
        return self.parameters_of(moe=self.is_moe(layer))

    @property
    def layer_parameters(self) -> int:
        """Parameters of one whole layer with all its experts; of a dense model, one dense layer."""
        return self.parameters_of(moe=self.experts > 0).total

    # Parameters outside the layers.

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, V d."""
        return self.vocab * self.hidden

    @property
    def position_parameters(self) -> int:
        """Parameters of learned position embeddings."""
        return self.positions * self.hidden

    @property
    def head_parameters(self) -> int:
        """Parameters that the LM head adds: none of its own where it is tied to the embedding."""
        return self.embedding_parameters * (not self.tied_embeddings) + self.vocab * self.head_bias

    @property
    def mtp_parameters(self) -> int:
        """Parameters of all MTP modules: each two norms, a 2d x d projection, a layer and a norm before the shared head
        (DeepSeek-V3, arXiv 2412.19437 section 2.2). Embedding and head are the model's own."""
        return self.mtp_layers * (3 * self.norm_width + 2 * self.hidden**2 + self.layer_parameters)

    # Whole models.

    @property
    def parameters(self) -> int:
        """All parameters: layers, embeddings, untied head, final norm, MTP modules and encoder."""
        layers = sum(
            count * self.parameters_of(moe=moe).total
            for moe, count in ((True, self.moe_layers), (False, self.dense_layers))
        )
        outside = self.embedding_parameters + self.position_parameters + self.head_parameters + self.norm_width
        return layers + outside + self.mtp_parameters + self.encoder_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that are active for one text token: `parameters` with top_k of the experts, without encoder."""
        routed_layers = self.moe_layers + (self.mtp_layers if self.experts else 0)
        idle = (self.experts - self.top_k) * self.expert_parameters
        return self.parameters - routed_layers * idle - self.encoder_parameters

    @property
    def paper_parameters(self) -> int:
        """As arXiv 2605.05049 and X-MoE count: L (n_mat E d f + 4 d^2), every layer MoE, nothing else."""
        return self.layers * (self.experts * self.expert_weights + 4 * self.hidden**2)

    @property
    def paper_active_parameters(self) -> int:
        """As X-MoE (arXiv 2508.13337) counts active parameters: L (n_mat k d f + 4 d^2)."""
        return self.layers * (self.top_k * self.expert_weights + 4 * self.hidden**2)

    @property
    def reported_parameters(self) -> int:
        """The size to print: as the source of the model counts it."""
        return self.paper_parameters if self.counting == "paper" else self.parameters

    @property
    def reported_active_parameters(self) -> int:
        """The active size to print: as the source of the model counts it."""
        return self.paper_active_parameters if self.counting == "paper" else self.active_parameters
