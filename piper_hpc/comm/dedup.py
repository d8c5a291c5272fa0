"""Rows that several choices share: numbering them where they are sent, and adding up what comes back for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Distinct:
    """Rows to send, each once a peer, by peer and then in the order they had.

    pack: for each row sent, the row it is a copy of; index: for each choice, its row among those for the same peer.
    """

    pack: torch.Tensor
    index: torch.Tensor


def distinct(present: torch.Tensor, row: torch.Tensor, peer: torch.Tensor, sent: Sequence[int]) -> Distinct:
    """Number the pairs of `present` [rows, peers], 1 where a row goes to a peer; `sent` are its sums by peer.

    row, peer: of each choice.
    """
    rows, peers = present.shape
    within = present.cumsum(0) - present
    total = sum(sent)
    starts = torch.tensor([0, *sent[:-1]], device=present.device).cumsum(0)
    # Pairs that are not present all write to one place past the end: no synchronisation to count them.
    target = torch.where(present > 0, within + starts, total).flatten()
    pack = present.new_empty(total + 1)
    pack[target] = torch.arange(rows, device=present.device).repeat_interleave(peers)
    return Distinct(pack[:-1], within[row, peer])


@dataclass(frozen=True)
class Fold:
    """Sums of rows in a fixed order: sum r adds rows index[offsets[r]:offsets[r + 1]], one after the other."""

    index: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def by(target: torch.Tensor, sums: int) -> Fold:
        """The sums by `target`, int64 [rows], of `sums` sums; rows of one sum are added in the order they stand."""
        counts = target.new_zeros(sums).scatter_add_(0, target, torch.ones_like(target))
        return Fold(torch.argsort(target, stable=True), counts.cumsum(0) - counts)

    def __call__(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """[sums, hidden] of rows [rows, hidden], each times its weight [rows] if given, added in float32 or wider."""
        wide = accumulator(rows.dtype)
        scale = None if weights is None else weights.index_select(0, self.index).to(wide)
        return F.embedding_bag(self.index, rows.to(wide), self.offsets, mode="sum", per_sample_weights=scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
