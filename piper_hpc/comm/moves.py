"""Moves of rows as autograd functions. None of them owns a weight, so each backward moves rows exactly once."""

from __future__ import annotations

from typing import Any

import torch

from piper_hpc.comm.channel import Channel


class Spread(torch.autograd.Function):
    """Copy each token once per choice, in sending order: [tokens, hidden] -> [tokens * top_k, hidden].

    The backward gathers by the inverse order and adds the `top_k` copies: deterministic, no scatter.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, order: torch.Tensor, place: torch.Tensor, top_k: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        copies = gradient.index_select(0, place)
        return copies.view(-1, ctx.top_k, gradient.shape[-1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Row i of the result is row order[i] of the input; `inverse` is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class Exchange(torch.autograd.Function):
    """Uneven all-to-all of rows; the backward is the same exchange the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send_rows: list[int], receive_rows: list[int], channel: Channel
    ) -> torch.Tensor:
        ctx.send_rows, ctx.receive_rows, ctx.channel = send_rows, receive_rows, channel
        return exchange(rows, send_rows, receive_rows, channel)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return exchange(gradient, ctx.receive_rows, ctx.send_rows, ctx.channel), None, None, None


def exchange(rows: torch.Tensor, send_rows: list[int], receive_rows: list[int], channel: Channel) -> torch.Tensor:
    """Send `send_rows[r]` rows to peer r of the channel and receive `receive_rows[r]` from it, in peer order."""
    received = rows.new_empty((sum(receive_rows), *rows.shape[1:]))
    channel.exchange(received, rows.contiguous(), receive_rows, send_rows).wait()
    return received
