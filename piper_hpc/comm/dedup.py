"""Rows that several choices share: numbering them where they are sent, and adding up what comes back for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Distinct:
    """Rows to send, each once a chunk and peer, by chunk, by peer and then in the order they had.

    pack: for each row sent, the row it is a copy of; index: for each choice, its row among those of the same chunk for
    the same peer.
    """

    pack: torch.Tensor
    index: torch.Tensor


def distinct(
    present: torch.Tensor, bounds: Sequence[int], sent: Sequence[Sequence[int]], row: torch.Tensor, peer: torch.Tensor
) -> Distinct:
    """Number the pairs of `present` [rows, peers], 1 where a row goes to a peer.

    bounds: of the rows of each chunk; sent: sums of `present` by chunk and peer; row, peer: of each choice.
    """
    (rows, peers), device = present.shape, present.device
    total = sum(map(sum, sent))
    sizes = torch.tensor([high - low for low, high in pairwise(bounds)], device=device)
    # Rows of the chunks before, by peer, and where the (chunk, peer) begins among all rows sent.
    by_pair = torch.tensor(sent, device=device).view(len(sent), peers)
    before = by_pair.cumsum(0) - by_pair
    starts = (by_pair.flatten().cumsum(0) - by_pair.flatten()).view_as(by_pair)
    within = present.cumsum(0) - present - before.repeat_interleave(sizes, 0, output_size=rows)
    # Pairs that are not present all write to one place past the end: no synchronisation to count them.
    target = torch.where(present > 0, within + starts.repeat_interleave(sizes, 0, output_size=rows), total).flatten()
    pack = present.new_empty(total + 1)
    pack[target] = torch.arange(rows, device=device).repeat_interleave(peers)
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

    def part(self, rows: tuple[int, int], sums: tuple[int, int]) -> Fold:
        """The sums `sums` (from, to), which add the rows `rows` (from, to) alone, as sums of those rows."""
        return Fold(self.index[slice(*rows)] - rows[0], self.offsets[slice(*sums)] - rows[0])

    def __call__(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """[sums, hidden] of rows [rows, hidden], each times its weight [rows] if given, added in float32 or wider."""
        wide = accumulator(rows.dtype)
        scale = None if weights is None else weights.index_select(0, self.index).to(wide)
        return F.embedding_bag(self.index, rows.to(wide), self.offsets, mode="sum", per_sample_weights=scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are added in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
