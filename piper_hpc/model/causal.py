"""What every kind of attention has: its window, the tables of its positions, and scores that may be computed again."""

from __future__ import annotations

import torch
from torch import nn

from piper_hpc.model import recompute
from piper_hpc.model.rotary import rotary_tables, rotate
from piper_hpc.model.scores import attend, score_mask
from piper_hpc.spec.model import ModelSpec


class CausalAttention(nn.Module):
    """Base of `Attention` and `LatentAttention`: a subclass makes queries, keys and values of its input.

    `sequence` fixes the length of the rotary tables; shorter inputs work too. scale: of scores.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        layer: int,
        sequence: int,
        *,
        scale: float,
        again: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """layer: global; again: compute scores, softmax and their product with values again in the backward."""
        super().__init__()
        self.run = recompute.again if again else recompute.kept
        self.scale = scale
        self.interleaved = spec.rope_interleaved
        self.window, self.window_kind = spec.window(layer), spec.window_kind
        self.positions = spec.has_positions(layer)
        if self.positions:
            cos, sin = rotary_tables(sequence, spec.rope_dim, spec.rope_theta, spec.rope_scaling)
            self.register_buffer("cos", cos.to(device, dtype), persistent=False)
            self.register_buffer("sin", sin.to(device, dtype), persistent=False)

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads [batch, heads, sequence, width] turned by their positions, in a layer that has any."""
        if not self.positions:
            return heads
        sequence = heads.shape[2]
        return rotate(heads, self.cos[:sequence], self.sin[:sequence], interleaved=self.interleaved)

    def attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `attend` makes of heads, by token: [batch, sequence, width of all heads]."""
        sequence = query.shape[2]
        mask = score_mask(sequence, self.window, self.window_kind, sinks is not None, query.device, query.dtype)
        rows: torch.Tensor = self.run(attend, query, key, value, mask, self.scale, sinks)
        return rows.transpose(1, 2).reshape(query.shape[0], sequence, -1)
