"""The flat dispatcher: one all-to-all over the whole expert group each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from piper_hpc.comm.autograd import Permute, PermuteTokens
from piper_hpc.comm.channel import Channel, GroupChannel
from piper_hpc.comm.exchange import all_to_all_of, begin_exchange, finish_exchange
from piper_hpc.comm.flat_plan import FlatHandle, FlatPlan, plan_flat, positions
from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.comm.volume import Sent
from piper_hpc.spec.all_to_all import CHUNKS, OVERLAP, Overlap
from piper_hpc.spec.expert_placement import ExpertPlacement


class FlatDispatcher:
    """The model's `Dispatcher` by one uneven `all_to_all_single` each way; without a group, by permutation alone.

    It makes two all-to-alls of rows in forward and two in backward, and one of counts in forward.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._channel: Channel | None = GroupChannel(group, "flat") if group is not None else None
        self._ranks = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def over(cls, channel: Channel, ranks: int) -> FlatDispatcher:
        """The same over any channel between `ranks` ranks."""
        made = cls()
        made._channel, made._ranks = channel, ranks
        return made

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
    ) -> FlatDispatcher:
        """See `piper_hpc.comm.factory.Build`; one level, of which chunks and overlap change nothing."""
        return cls.over(channels[0], hierarchy.places.ranks)

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> tuple[torch.Tensor, FlatHandle[FlatPlan]]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`."""
        plan = plan_flat(expert_ids, positions(placement, tokens.device), self._ranks, self._channel)
        rows: torch.Tensor = PermuteTokens.apply(tokens, plan.order, plan.inverse_order, plan.top_k)
        if self._channel is None:
            return rows, FlatHandle(plan, weights, lambda begun: begun)
        exchange = all_to_all_of(self._channel, plan.send_rows, plan.recv_rows)

        def grouped(begun: torch.Tensor) -> torch.Tensor:
            arrived = finish_exchange(begun, exchange)
            by_slot: torch.Tensor = Permute.apply(arrived, plan.expert_order, plan.arrival_order)
            return by_slot

        return begin_exchange(rows, exchange), FlatHandle(plan, weights, grouped)

    def combine(self, rows: torch.Tensor, handle: FlatHandle[FlatPlan]) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        plan = handle.plan
        if self._channel is not None:
            rows = Permute.apply(rows, plan.arrival_order, plan.expert_order)
            exchange = all_to_all_of(self._channel, plan.recv_rows, plan.send_rows)
            rows = finish_exchange(begin_exchange(rows, exchange), exchange)
        copies = Permute.apply(rows, plan.inverse_order, plan.order).view(-1, plan.top_k, rows.shape[-1])
        # Not a batched product: of matrices this thin it takes about three times as long on a CPU.
        return (copies * handle.weights.unsqueeze(-1)).sum(1)

    def sent(self, plan: FlatPlan) -> list[Sent]:
        """See `piper_hpc.comm.factory.GroupDispatcher.sent`."""
        return [Sent(peer, rows) for peer, rows in enumerate(plan.send_rows)]
