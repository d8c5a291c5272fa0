"""Permutation of rows as autograd functions; each backward moves the gradient's rows exactly once."""

from __future__ import annotations

from typing import Any

import torch


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
