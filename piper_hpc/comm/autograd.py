"""Permutation and all-to-all of rows as autograd functions; each backward moves the gradient's rows exactly once."""

from __future__ import annotations

from typing import Any

import torch

from piper_hpc.comm.channel import Channel


class PermuteTokens(torch.autograd.Function):
    """Copy each token once per choice, in sending order: [tokens, hidden] -> [tokens * top_k, hidden].

    order: choice (token * top_k + choice) of each row, int64 [tokens * top_k]; inverse_order: its inverse. The backward
    gathers by the inverse order and adds the `top_k` copies: deterministic, no scatter.
    """

    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse_order: torch.Tensor, top_k: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse_order)
        ctx.top_k = top_k
        return tokens.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse_order,) = ctx.saved_tensors
        copies = gradient.index_select(0, inverse_order)
        return copies.view(-1, ctx.top_k, gradient.shape[-1]).sum(1), None, None, None


class Permute(torch.autograd.Function):
    """Row i of the result is row order[i] of the input, both [rows, hidden]; `inverse` is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows: [sum(send_rows), hidden] -> [sum(recv_rows), hidden]; the backward is the all-to-all
    the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, send_rows: list[int], recv_rows: list[int], channel: Channel
    ) -> torch.Tensor:
        ctx.send_rows, ctx.recv_rows, ctx.channel = send_rows, recv_rows, channel
        return all_to_all(rows, send_rows, recv_rows, channel)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return all_to_all(gradient, ctx.recv_rows, ctx.send_rows, ctx.channel), None, None, None


def all_to_all(rows: torch.Tensor, send_rows: list[int], recv_rows: list[int], channel: Channel) -> torch.Tensor:
    """Send `send_rows[r]` rows to peer r of the channel and receive `recv_rows[r]` from it, in peer order."""
    received = rows.new_empty((sum(recv_rows), *rows.shape[1:]))
    channel.all_to_all(received, rows.contiguous(), recv_rows, send_rows).wait()
    return received
