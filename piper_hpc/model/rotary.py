"""Rotary position embedding: its frequencies, stretched or not, and the rotation of heads."""

from __future__ import annotations

import math

import torch

from piper_hpc.spec.rope import RopeScaling


def rotary_tables(
    sequence: int, rope_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position * frequency, float64 [sequence, rope_dim / 2], times the scaling's factor."""
    angles = torch.outer(torch.arange(sequence, dtype=torch.float64), frequencies(rope_dim, theta, scaling))
    factor = scaling.rotation_factor if scaling is not None else 1.0
    return angles.cos() * factor, angles.sin() * factor


def frequencies(rope_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """Radians a position, float64 [rope_dim / 2]: theta^(-2i/rope_dim) (arXiv 2104.09864), stretched by `scaling`."""
    plain = theta ** (-torch.arange(0, rope_dim, 2, dtype=torch.float64) / rope_dim)
    if scaling is None:
        return plain
    stretched = plain / scaling.factor
    if scaling.kind == "linear":
        return stretched
    kept = _llama3_share(plain, scaling) if scaling.kind == "llama3" else _yarn_share(rope_dim, theta, scaling)
    return stretched * (1 - kept) + plain * kept


def _llama3_share(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency stays: all where it turns more than high_freq_factor times in the old context."""
    turns = scaling.original_positions * plain / (2 * math.pi)
    width = max(scaling.high_freq_factor - scaling.low_freq_factor, 1e-9)  # without one it is a step
    return ((turns - scaling.low_freq_factor) / width).clamp(0, 1)


def _yarn_share(rope_dim: int, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency stays (arXiv 2309.00071 Eq 17-21): a ramp over dimensions from beta_fast turns in the
    old context, where all of it does, to beta_slow."""

    def dimension(turns: float) -> float:
        return rope_dim * math.log(scaling.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0, 1)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Turn the leading 2 * cos.shape[-1] numbers of every head, in pairs (i, i + half) as GPT-NeoX has them.

    heads [batch, heads, sequence, width]; cos, sin [sequence, half]. interleaved: pairs are (2i, 2i + 1); they come out
    as (i, i + half), which is the same to scores where queries and keys both do. Returns the shape of `heads`.
    """
    turned, rest = heads[..., : 2 * cos.shape[-1]], heads[..., 2 * cos.shape[-1] :]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*parts, rest) if rest.shape[-1] else parts, dim=-1)
