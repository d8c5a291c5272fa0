"""Multi-head latent attention (MLA): low-rank queries, and keys and values from one small latent of each token."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from piper_hpc.model.causal import CausalAttention
from piper_hpc.spec.model import ModelSpec

LATENT_NORM_EPS = 1e-6
"""Of the norms of both latents in the released models, whatever the epsilon of the others."""


class LatentAttention(CausalAttention):
    """DeepSeek-V2's attention (arXiv 2405.04434 section 2.1).

    The last qk_rope_dim numbers of a query head are turned by position, and so is one key of that width, which all
    heads share; the rest of keys, and values, come from a latent.

    q_lora_rank = 0: queries by one full matrix.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        sequence: int,
        *,
        again: bool = False,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """See `CausalAttention`."""
        scale = spec.head_dim**-0.5 * (spec.rope_scaling.score_factor if spec.rope_scaling is not None else 1.0)
        super().__init__(spec, layer, sequence, scale=scale, again=again, device=device, dtype=dtype)
        self.heads, self.nope, self.rope = spec.heads, spec.qk_nope_dim, spec.qk_rope_dim
        self.rank, self.v_head_dim = spec.kv_lora_rank, spec.v_head_dim
        linear = partial(nn.Linear, device=device, dtype=dtype)
        norm = partial(nn.RMSNorm, eps=LATENT_NORM_EPS, device=device, dtype=dtype)
        self.query: nn.Linear | None = None
        if spec.q_lora_rank:
            self.query_down = linear(spec.hidden, spec.q_lora_rank, bias=spec.attention_bias)
            self.query_norm = norm(spec.q_lora_rank)
            self.query_up = linear(spec.q_lora_rank, spec.q_dim, bias=False)
        else:
            self.query = linear(spec.hidden, spec.q_dim, bias=False)
        self.latent_down = linear(spec.hidden, self.rank + self.rope, bias=spec.attention_bias)
        self.latent_norm = norm(self.rank)
        self.latent_up = linear(self.rank, self.heads * (self.nope + self.v_head_dim), bias=False)
        self.o = linear(spec.v_dim, spec.hidden, bias=spec.output_bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        if self.query is not None:
            queries = self.query(hidden)
        else:
            queries = self.query_up(self.query_norm(self.query_down(hidden)))
        plain, turned = self._by_head(queries).split((self.nope, self.rope), dim=-1)
        query = torch.cat((plain, self.turn(turned)), dim=-1)
        latent, shared = self.latent_down(hidden).split((self.rank, self.rope), dim=-1)
        plain, value = self._by_head(self.latent_up(self.latent_norm(latent))).split(
            (self.nope, self.v_head_dim), dim=-1
        )
        shared = self.turn(shared.unsqueeze(1))
        key = torch.cat((plain, shared.expand(-1, self.heads, -1, -1)), dim=-1)
        return self.o(self.attended(query, key, value))

    def _by_head(self, rows: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, width of all heads] -> [batch, heads, sequence, width of one]."""
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
