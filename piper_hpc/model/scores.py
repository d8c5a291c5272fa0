"""Causal attention over whole sequences, windows or chunks, with or without sinks, by torch's fused kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

SINK_WIDTH = 8
"""What a head grows by to hold a sink: fused kernels read widths of a multiple of 8."""


@lru_cache(maxsize=32)
def score_mask(
    sequence: int, window: int, kind: str, sink: bool, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """What is added to scores, [sequence, keys]: 0 for the keys that a query sees, -inf for the others.

    It sees those before it, of its window or chunk, and the sink, which is the last key. window: tokens that a query
    sees, 0 for all; kind: `sliding`, or `chunked`, where it sees those of its own chunk. None where it is plain
    causality, which the kernel needs no mask for. One for all layers: the kernel makes numbers of a bool for each.
    """
    windowed = 0 < window < sequence
    if not windowed and not sink:
        return None
    query = torch.arange(sequence, device=device)[:, None]
    key = torch.arange(sequence, device=device)[None, :]
    visible = key <= query
    if windowed:
        visible &= query // window == key // window if kind == "chunked" else query - key < window
    visible = F.pad(visible, (0, 1), value=True) if sink else visible
    return torch.zeros(visible.shape, device=device, dtype=dtype).masked_fill(~visible, -torch.inf)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale * query key) value over the keys that each query sees.

    query [batch, heads, sequence, width]; key [batch, kv_heads, sequence, width], value the same but of its own width.
    mask: as `score_mask` gives it, None for plain causality. sinks [heads]: one more logit in every softmax of a
    head, which takes its share to nothing (gpt-oss). Returns [batch, heads, sequence, value's width].
    """
    width = value.shape[-1]
    if sinks is not None:
        query, key, value = _with_sink(query, key, value, sinks / scale)
    if value.shape[-1] < query.shape[-1]:  # kernels want one width; zeros beside values come out as zeros
        value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return attended[..., :width]


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A key more, the sink, whose product with a query is its head's logit: a query brings the logit in a number of its
    own, which only that key has a one for. Its gradient comes with the query's, and the kernel stays fused."""
    batch, heads, sequence, _ = query.shape
    brought = F.pad(logits.to(query.dtype).view(1, heads, 1, 1), (0, SINK_WIDTH - 1))
    query = torch.cat((query, brought.expand(batch, heads, sequence, SINK_WIDTH)), dim=-1)
    sink = F.pad(key.new_ones(1), (key.shape[-1], SINK_WIDTH - 1)).expand(batch, key.shape[1], 1, -1)
    return query, torch.cat((F.pad(key, (0, SINK_WIDTH)), sink), dim=2), F.pad(value, (0, 0, 0, 1))
