"""Causal grouped-query attention with rotary positions."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from piper_hpc.model import recompute
from piper_hpc.spec.model import ModelSpec


class Attention(nn.Module):
    """Multi-head attention with `kv_heads` shared key and value heads (GQA, arXiv 2305.13245), causal.

    `sequence` fixes the length of the rotary tables; shorter inputs work too.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, spec: ModelSpec, sequence: int, *, again: bool = False, device: torch.device, dtype: torch.dtype
    ) -> None:
        """again: compute scores, softmax and their product with values again in the backward."""
        super().__init__()
        self.run = recompute.again if again else recompute.kept
        self.head_dim = spec.head_dim
        self.grouped = spec.kv_heads != spec.heads
        linear = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.q = linear(spec.hidden, spec.q_dim)
        self.k = linear(spec.hidden, spec.kv_dim)
        self.v = linear(spec.hidden, spec.kv_dim)
        self.o = linear(spec.q_dim, spec.hidden)
        cos, sin = rotary_tables(sequence, spec.head_dim, spec.rope_theta)
        self.register_buffer("cos", cos.to(device, dtype), persistent=False)
        self.register_buffer("sin", sin.to(device, dtype), persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        batch, sequence, _ = hidden.shape
        cos, sin = self.cos[:sequence], self.sin[:sequence]
        query, key, value = (
            projection(hidden).view(batch, sequence, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q, self.k, self.v)
        )
        attended = self.run(self._attend, rotate(query, cos, sin), rotate(key, cos, sin), value)
        return self.o(attended.transpose(1, 2).reshape(batch, sequence, -1))

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.grouped)


def rotary_tables(sequence: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * theta^(-2i/head_dim), float64 [sequence, head_dim / 2] (arXiv 2104.09864)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(sequence, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864), with pairs (i, i + head_dim / 2) as GPT-NeoX has them.

    heads [batch, heads, sequence, head_dim]; cos, sin [sequence, head_dim / 2]. Returns the shape of `heads`.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
