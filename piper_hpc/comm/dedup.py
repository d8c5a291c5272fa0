"""Deduplication: one row for several choices of a token, numbered where it is sent; sums of what comes back for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class DedupRows:
    """Rows to send, each once a chunk and peer: by chunk, by peer and then in the order of the rows held.

    pack: for each row sent, the row it copies, int64 [rows sent]; index: for each choice, its row among those of the
    same chunk for the same peer, int64 [choices].
    """

    pack: torch.Tensor
    index: torch.Tensor


def deduplicate(
    present: torch.Tensor, bounds: Sequence[int], sent: Sequence[Sequence[int]], row: torch.Tensor, peer: torch.Tensor
) -> DedupRows:
    """Number the pairs of `present`, int64 [rows, peers], 1 where a row goes to a peer.

    bounds: where the rows of each chunk begin and end; sent: sums of `present` by chunk and peer, on the host; row,
    peer: of each choice, int64 [choices].
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
    return DedupRows(pack[:-1], within[row, peer])


@dataclass(frozen=True)
class SegmentSum:
    """Sums of rows in a fixed order: sum r adds rows index[offsets[r]:offsets[r + 1]], one after the other. index:
    int64 [rows]; offsets: int64 [sums]."""

    index: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def by(target: torch.Tensor, sums: int) -> SegmentSum:
        """Row i is added to sum target[i] of `sums`, rows of one sum in ascending order; target: int64 [rows]."""
        return SegmentSum.ordered(target, target, sums)

    @staticmethod
    def by_expert(target: torch.Tensor, sums: int, expert: torch.Tensor, experts: int) -> SegmentSum:
        """The same, rows of one sum by the logical expert that they come from, so that no placement inside of what is
        summed changes a bit; expert: int64 [rows], of `experts`."""
        return SegmentSum.ordered(target * experts + expert, target, sums)

    @staticmethod
    def ordered(key: torch.Tensor, target: torch.Tensor, sums: int) -> SegmentSum:
        """Rows in ascending order of `key`, int64 [rows], which orders their targets as well."""
        counts = target.new_zeros(sums).scatter_add_(0, target, torch.ones_like(target))
        return SegmentSum(torch.argsort(key, stable=True), counts.cumsum(0) - counts)

    def part(self, rows: tuple[int, int], sums: tuple[int, int]) -> SegmentSum:
        """Only the sums `sums` (from, to), which add the rows `rows` (from, to) and no others: indices count from
        rows[0]."""
        return SegmentSum(self.index[slice(*rows)] - rows[0], self.offsets[slice(*sums)] - rows[0])

    def __call__(self, rows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """[sums, hidden] of rows [rows, hidden], each times its weight [rows] if given, added in float32 or wider."""
        wide = accumulator(rows.dtype)
        scale = None if weights is None else weights.index_select(0, self.index).to(wide)
        return F.embedding_bag(self.index, rows.to(wide), self.offsets, mode="sum", per_sample_weights=scale)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are added: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
