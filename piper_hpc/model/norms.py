"""The norms that models use."""

from __future__ import annotations

import torch
from torch import nn

from piper_hpc.spec.model import ModelSpec


def make_norm(spec: ModelSpec, width: int, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model's norm over the last dimension: RMSNorm (arXiv 1910.07467), or LayerNorm with or without a bias."""
    if spec.norm == "rms":
        return nn.RMSNorm(width, eps=spec.norm_eps, device=device, dtype=dtype)
    return nn.LayerNorm(width, eps=spec.norm_eps, bias=spec.norm == "layer", device=device, dtype=dtype)


class L2Norm(nn.Module):
    """RMSNorm without parameters, over a head of queries or keys (Llama 4)."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., width] -> the same shape, each head's mean square one."""
        return nn.functional.rms_norm(heads, heads.shape[-1:], eps=self.eps)
