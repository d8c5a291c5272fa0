"""The flat dispatcher: one all-to-all over the whole expert group each way."""

from __future__ import annotations

import torch
import torch.distributed as dist

from piper_hpc.comm.channel import Channel, GroupChannel
from piper_hpc.comm.moves import Exchange, Permute, Spread
from piper_hpc.comm.plan import Handle, plan_exchange
from piper_hpc.spec.placement import Placement


class FlatDispatcher:
    """The model's `Dispatcher` by one uneven `all_to_all_single` each way; without a group, by permutation alone.

    It makes two exchanges of rows in forward and two in backward, and one of counts in forward.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._channel: Channel | None = GroupChannel(group, "flat") if group is not None else None
        self._ranks = dist.get_world_size(group) if group is not None else 1
        self._positions: dict[tuple[Placement, torch.device], torch.Tensor] = {}

    @classmethod
    def over(cls, channel: Channel, ranks: int) -> FlatDispatcher:
        """The same over any channel between `ranks` ranks."""
        made = cls()
        made._channel, made._ranks = channel, ranks
        return made

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor, Handle]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`."""
        plan = plan_exchange(expert_ids, self._position_of_expert(placement, tokens.device), self._ranks, self._channel)
        rows: torch.Tensor = Spread.apply(tokens, plan.order, plan.place, plan.top_k)
        if self._channel is not None:
            rows = Exchange.apply(rows, plan.send_rows, plan.receive_rows, self._channel)
            rows = Permute.apply(rows, plan.group_order, plan.arrival)
        return rows, Handle(plan, weights)

    def combine(self, rows: torch.Tensor, handle: Handle) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        plan = handle.plan
        if self._channel is not None:
            rows = Permute.apply(rows, plan.arrival, plan.group_order)
            rows = Exchange.apply(rows, plan.receive_rows, plan.send_rows, self._channel)
        copies = Permute.apply(rows, plan.place, plan.order).view(-1, plan.top_k, rows.shape[-1])
        # Not a batched product: of matrices this thin it takes about three times as long on a CPU.
        return (copies * handle.weights.unsqueeze(-1)).sum(1)

    def _position_of_expert(self, placement: Placement, device: torch.device) -> torch.Tensor:
        """rank * experts_per_rank + slot of each logical expert, kept on the device."""
        key = (placement, device)
        if key not in self._positions:
            per_rank = placement.experts_per_rank
            pairs = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
            self._positions[key] = torch.tensor([rank * per_rank + slot for rank, slot in pairs], device=device)
        return self._positions[key]
