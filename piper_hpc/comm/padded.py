"""The padded dispatcher, as DeepSpeed-MoE and Tutel exchange tokens where none may be dropped; to compare with.

Every source sends every expert a block of equal length, that of the largest block of the whole group, so that one even
all-to-all does; experts compute the padding too. It adds rows of zeros, which change neither outputs nor gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from piper_hpc.comm.autograd import Permute, PermuteTokens
from piper_hpc.comm.channel import Channel, wait_on_host
from piper_hpc.comm.exchange import Exchange, all_to_all_of, begin_exchange, finish_exchange
from piper_hpc.comm.flat_plan import FlatHandle, inverse, positions
from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.comm.volume import Sent
from piper_hpc.spec.all_to_all import CHUNKS, OVERLAP, Overlap
from piper_hpc.spec.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class PaddedPlan:
    """One dispatch. order, inverse_order: choices by block and back, int64 [tokens * top_k]; place: of each row among
    the padded ones, int64 [tokens * top_k]; block_rows: of every block; offsets: as in FlatPlan."""

    top_k: int
    order: torch.Tensor
    inverse_order: torch.Tensor
    place: torch.Tensor
    block_rows: int
    offsets: torch.Tensor


class PaddedDispatcher:
    """The model's `Dispatcher` by one even all-to-all each way, over a group of `ranks` ranks."""

    def __init__(self, channel: Channel, ranks: int) -> None:
        self._channel, self._ranks = channel, ranks

    @classmethod
    def build(
        cls,
        hierarchy: Hierarchy,
        rank: int,
        channels: Sequence[Channel],
        *,
        dedup: bool = False,
        chunks: int = CHUNKS,
        overlap: Overlap = OVERLAP,
    ) -> PaddedDispatcher:
        """See `piper_hpc.comm.factory.Build`; one level, of which chunks and overlap change nothing."""
        return cls(channels[0], hierarchy.places.ranks)

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> tuple[torch.Tensor, FlatHandle[PaddedPlan]]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`; padding rows of zeros are among the rows."""
        plan = self._plan(expert_ids, placement)
        experts, hidden = len(placement.rank_of_expert), tokens.shape[-1]
        rows: torch.Tensor = PermuteTokens.apply(tokens, plan.order, plan.inverse_order, plan.top_k)
        rows = rows.new_zeros(experts * plan.block_rows, hidden).index_copy(0, plan.place, rows)
        exchange = self._exchange(plan.block_rows * placement.experts_per_rank)

        def grouped(begun: torch.Tensor) -> torch.Tensor:
            # Blocks arrive by source, then slot; the experts get them by slot.
            arrived = finish_exchange(begun, exchange)
            blocks = arrived.view(self._ranks, placement.experts_per_rank, plan.block_rows, hidden)
            return blocks.transpose(0, 1).reshape(-1, hidden)

        return begin_exchange(rows, exchange), FlatHandle(plan, weights, grouped)

    def combine(self, rows: torch.Tensor, handle: FlatHandle[PaddedPlan]) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        plan, hidden = handle.plan, rows.shape[-1]
        blocks = rows.view(len(plan.offsets), self._ranks, plan.block_rows, hidden)
        exchange = self._exchange(plan.block_rows * len(plan.offsets))
        rows = finish_exchange(begin_exchange(blocks.transpose(0, 1).reshape(-1, hidden), exchange), exchange)
        copies = Permute.apply(rows.index_select(0, plan.place), plan.inverse_order, plan.order)
        return (copies.view(-1, plan.top_k, hidden) * handle.weights.unsqueeze(-1)).sum(1)

    def sent(self, plan: PaddedPlan) -> list[Sent]:
        """See `piper_hpc.comm.factory.GroupDispatcher.sent`."""
        return [Sent(peer, plan.block_rows * len(plan.offsets)) for peer in range(self._ranks)]

    def _exchange(self, rows_per_rank: int) -> Exchange:
        even = [rows_per_rank] * self._ranks
        return all_to_all_of(self._channel, even, even)

    def _plan(self, expert_ids: torch.Tensor, placement: ExpertPlacement) -> PaddedPlan:
        """Collective: every rank tells every other the length of its longest block."""
        per_rank, device = placement.experts_per_rank, expert_ids.device
        blocks = positions(placement, device)[expert_ids.reshape(-1)]
        order = torch.argsort(blocks, stable=True)
        counts = blocks.new_zeros(len(placement.rank_of_expert)).scatter_add_(0, blocks, torch.ones_like(blocks))
        lengths = counts.max().repeat(self._ranks)
        received = torch.empty_like(lengths)
        work = self._channel.all_to_all(received, lengths, [1] * self._ranks, [1] * self._ranks)
        work.wait()
        wait_on_host([work])
        block_rows = int(received.max())
        starts = counts.cumsum(0) - counts
        sorted_blocks = blocks[order]
        at = torch.arange(blocks.numel(), device=device) - starts[sorted_blocks]
        slots = torch.arange(1, per_rank + 1, dtype=torch.int32, device=device)
        return PaddedPlan(
            top_k=expert_ids.shape[-1],
            order=order,
            inverse_order=inverse(order),
            place=sorted_blocks * block_rows + at,
            block_rows=block_rows,
            offsets=slots * (self._ranks * block_rows),
        )
