"""Causal attention of one layer: grouped-query (GQA) with rotary positions and what models add to it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from piper_hpc.model.causal import CausalAttention
from piper_hpc.model.norms import L2Norm, make_norm
from piper_hpc.spec.model import ModelSpec


class Attention(CausalAttention):
    """Multi-head attention with `kv_heads` shared key and value heads (GQA, arXiv 2305.13245), causal.

    What the spec asks of this layer is there: biases, norms of queries and keys, clipping, a window, sinks, no
    positions and queries that grow instead.
    """

    growth: torch.Tensor

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
        scale = spec.head_dim**-0.5
        super().__init__(spec, layer, sequence, scale=scale, again=again, device=device, dtype=dtype)
        self.head_dim, self.clip = spec.head_dim, spec.clip_qkv
        linear = partial(nn.Linear, device=device, dtype=dtype)
        self.q = linear(spec.hidden, spec.q_dim, bias=spec.attention_bias)
        self.k = linear(spec.hidden, spec.kv_dim, bias=spec.attention_bias)
        self.v = linear(spec.hidden, spec.kv_dim, bias=spec.attention_bias)
        self.o = linear(spec.q_dim, spec.hidden, bias=spec.output_bias)
        self.sinks = nn.Parameter(torch.empty(spec.heads, device=device, dtype=dtype)) if spec.attention_sinks else None
        # Of all heads' width it is before heads are told apart, of one head's after; without parameters, after RoPE.
        self.norm_of_all, self.norm_rotated = spec.qk_norm == "full", spec.qk_norm == "l2"
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if spec.qk_norm in ("head", "full"):
            widths = (spec.q_dim, spec.kv_dim) if self.norm_of_all else (spec.head_dim, spec.head_dim)
            self.q_norm, self.k_norm = (make_norm(spec, width, device=device, dtype=dtype) for width in widths)
        elif spec.qk_norm == "l2" and self.positions:
            self.q_norm = self.k_norm = L2Norm(spec.norm_eps)
        self.grows = bool(spec.temperature_floor) and not self.positions
        if self.grows:
            steps = torch.floor(torch.arange(1, sequence + 1, dtype=torch.float64) / spec.temperature_floor)
            growth = 1 + spec.temperature_scale * torch.log1p(steps)
            self.register_buffer("growth", growth.to(device, dtype).view(-1, 1), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        query = self.turn(self._by_head(self.q(hidden), self.q_norm))
        key = self.turn(self._by_head(self.k(hidden), self.k_norm))
        value = self._by_head(self.v(hidden), None)
        if self.norm_rotated and self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.grows:
            query = query * self.growth[: hidden.shape[1]]
        return self.o(self.attended(query, key, value, self.sinks))

    def _by_head(self, rows: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """[batch, sequence, width of all heads] -> [batch, heads, sequence, head_dim], normed if that comes first."""
        if norm is not None and self.norm_of_all:
            rows = norm(rows)
        if self.clip:
            rows = rows.clamp(-self.clip, self.clip)
        heads = rows.unflatten(-1, (-1, self.head_dim))
        if norm is not None and not self.norm_of_all and not self.norm_rotated:
            heads = norm(heads)
        return heads.transpose(1, 2)
