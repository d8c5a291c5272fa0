"""The experts of one rank, stacked, applied to rows that come grouped by expert."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from piper_hpc.model import recompute
from piper_hpc.model.feed_forward import make_inner
from piper_hpc.spec.model import ModelSpec


class Experts(nn.Module):
    """`experts_per_rank` feed-forward experts: with three matrices gated (arXiv 2002.05202), with two not.

    Weights are [experts_per_rank, in, out]: w1 (gate or only input), w3 (up, where gated), w2 (down); biases, where the
    spec has them, w1_bias, w3_bias [experts_per_rank, expert_ffn] and w2_bias [experts_per_rank, hidden].
    """

    def __init__(
        self, spec: ModelSpec, experts_per_rank: int, *, again: bool = False, device: torch.device, dtype: torch.dtype
    ) -> None:
        """again: compute the activation, which is as wide as the experts, again in the backward."""
        super().__init__()
        self.run = recompute.again if again else recompute.kept
        self.inner = make_inner(spec)
        check_alignment(spec, dtype)
        empty = partial(torch.empty, device=device, dtype=dtype)
        into, out_of = (spec.hidden, spec.expert_ffn), (spec.expert_ffn, spec.hidden)
        self.w1 = nn.Parameter(empty(experts_per_rank, *into))
        self.w2 = nn.Parameter(empty(experts_per_rank, *out_of))
        gated = spec.matrices_per_expert == 3
        self.w3 = nn.Parameter(empty(experts_per_rank, *into)) if gated else None
        self.w1_bias = nn.Parameter(empty(experts_per_rank, spec.expert_ffn)) if spec.ffn_bias else None
        self.w2_bias = nn.Parameter(empty(experts_per_rank, spec.hidden)) if spec.ffn_bias else None
        self.w3_bias = nn.Parameter(empty(experts_per_rank, spec.expert_ffn)) if spec.ffn_bias and gated else None

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """rows [rows, hidden] grouped by expert; offsets int32 [experts_per_rank], the end of each group.

        Returns [rows, hidden]: w2(inner(w1 x, w3 x)), the model's activation between.
        """
        multiply = looped_mm if rows.dtype == torch.float64 else grouped_mm
        owners = None if self.w1_bias is None else owner_of_rows(offsets, rows.shape[0])

        def biased(product: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return product if bias is None or owners is None else product + bias[owners]

        gate = biased(multiply(rows, self.w1, offsets), self.w1_bias)
        up = None if self.w3 is None else biased(multiply(rows, self.w3, offsets), self.w3_bias)

        # The last product is inside, for it keeps the activation; run again, it stops short of computing that product.
        def down(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
            return biased(multiply(self.inner(gate, up), self.w2, offsets), self.w2_bias)

        return self.run(down, gate, up)


def owner_of_rows(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """Which expert of the rank each row belongs to, int64 [rows]; offsets int32 [experts_per_rank]."""
    return torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)


def grouped_mm(rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Each row times the matrix of its group, in one kernel (torch's F.grouped_mm).

    rows [rows, in]; weights [groups, in, out]; offsets int32 [groups], the end of each group, the last one being the
    number of rows. Returns [rows, out].
    """
    return F.grouped_mm(rows, weights, offs=offsets)


def looped_mm(rows: torch.Tensor, weights: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """`grouped_mm` as one product a group, for float64, which the kernel refuses; the host waits for `offsets`.

    rows [rows, in]; weights [groups, in, out]; offsets int32 [groups]. Returns [rows, out].
    """
    ends = offsets.tolist()
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    groups = zip(rows.split(sizes), weights.unbind(), strict=True)
    return torch.cat([group @ weight for group, weight in groups])


def check_alignment(spec: ModelSpec, dtype: torch.dtype) -> None:
    """grouped_mm needs rows of a multiple of 16 bytes; raises ValueError with the next width that works."""
    values = 16 // dtype.itemsize
    for key, width in (("hidden", spec.hidden), ("expert_ffn", spec.expert_ffn)):
        if width % values:
            raise ValueError(
                f"model.{key}={width}: grouped experts in {dtype} need a multiple of {values}, "
                f"for example {-(-width // values) * values}"
            )
