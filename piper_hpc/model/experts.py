"""The experts of one rank, stacked, applied to rows that come grouped by expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from piper_hpc.model import recompute
from piper_hpc.spec.model import ModelSpec


class Experts(nn.Module):
    """`experts_per_rank` feed-forward experts: SwiGLU with three matrices (arXiv 2002.05202), GELU with two.

    Weights are [experts_per_rank, in, out]: w1 (gate or only input), w3 (up, SwiGLU alone), w2 (down).
    """

    def __init__(
        self, spec: ModelSpec, experts_per_rank: int, *, again: bool = False, device: torch.device, dtype: torch.dtype
    ) -> None:
        """again: compute the activation, which is as wide as the experts, again in the backward."""
        super().__init__()
        self.run = recompute.again if again else recompute.kept
        check_alignment(spec, dtype)
        into = (experts_per_rank, spec.hidden, spec.expert_ffn)
        out_of = (experts_per_rank, spec.expert_ffn, spec.hidden)
        self.w1 = nn.Parameter(torch.empty(into, device=device, dtype=dtype))
        self.w2 = nn.Parameter(torch.empty(out_of, device=device, dtype=dtype))
        gated = spec.matrices_per_expert == 3
        self.w3 = nn.Parameter(torch.empty(into, device=device, dtype=dtype)) if gated else None

    def forward(self, rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """rows [rows, hidden] grouped by expert; offsets int32 [experts_per_rank], the end of each group.

        Returns [rows, hidden]: w2(silu(w1 x) * (w3 x)) for SwiGLU (arXiv 2002.05202 Eq 6), w2(gelu(w1 x)) else.
        """
        multiply = looped_mm if rows.dtype == torch.float64 else grouped_mm
        gate = multiply(rows, self.w1, offsets)
        up = None if self.w3 is None else multiply(rows, self.w3, offsets)

        # The last product is inside, for it keeps the activation; run again, it stops short of computing that product.
        def down(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
            inner = F.gelu(gate) if up is None else F.silu(gate) * up
            return multiply(inner, self.w2, offsets)

        return self.run(down, gate, up)


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
