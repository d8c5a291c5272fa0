"""Who sends which rows to whom: index arithmetic on the routing's device, apart from the exchange itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from piper_hpc.comm.channel import Channel, settle


@dataclass(frozen=True)
class ExchangePlan:
    """One dispatch, computed once and used by dispatch, combine and the backward of both.

    order: assignment (token * top_k + choice) of each row sent, int64 [tokens * top_k]; place: its inverse.
    send_rows, receive_rows: rows to and from each rank of the group.
    group_order: for each delivered row its index among the rows as they arrived, [rows]; arrival: its inverse; both
    are None where rows arrive in order (a group of one).
    offsets: where each local expert's rows end, int32 [experts_per_rank].
    """

    top_k: int
    order: torch.Tensor
    place: torch.Tensor
    send_rows: list[int]
    receive_rows: list[int]
    group_order: torch.Tensor | None
    arrival: torch.Tensor | None
    offsets: torch.Tensor


@dataclass(frozen=True)
class Handle:
    """What `combine` needs to undo a `dispatch`: the plan, and the weights [tokens, top_k] with their gradient."""

    plan: ExchangePlan
    weights: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """Where each local expert's rows end, int32 [experts_per_rank], on the rows' device."""
        return self.plan.offsets


def plan_exchange(
    expert_ids: torch.Tensor, position_of_expert: torch.Tensor, ranks: int, channel: Channel | None
) -> ExchangePlan:
    """Plan the exchange of every (token, choice) of `expert_ids`, int64 [tokens, top_k].

    position_of_expert: rank * experts_per_rank + slot of each logical expert, int64 [experts]. Counts are exchanged
    over `channel`, then read by the host once: the only synchronisation of a dispatch.
    """
    experts = position_of_expert.numel()
    positions = position_of_expert[expert_ids.reshape(-1)]
    order = torch.argsort(positions, stable=True)
    place = inverse(order)
    # Not bincount: on a GPU it reads the largest value on the host.
    sent = positions.new_zeros(experts).scatter_add_(0, positions, torch.ones_like(positions)).view(ranks, -1)
    if channel is None:
        rows = positions.numel()
        return ExchangePlan(
            expert_ids.shape[-1], order, place, [rows], [rows], None, None, sent[0].cumsum(0).to(torch.int32)
        )
    received = torch.empty_like(sent)
    exchange = channel.exchange(received, sent, [1] * ranks, [1] * ranks)
    exchange.wait()
    settle([exchange])
    send_rows, receive_rows = torch.stack((sent.sum(1), received.sum(1))).tolist()
    group_order = _order_by_slot(received, sum(receive_rows))
    return ExchangePlan(
        top_k=expert_ids.shape[-1],
        order=order,
        place=place,
        send_rows=send_rows,
        receive_rows=receive_rows,
        group_order=group_order,
        arrival=inverse(group_order),
        offsets=received.sum(0).cumsum(0).to(torch.int32),
    )


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation, without a sort."""
    result = torch.empty_like(order)
    result[order] = torch.arange(order.numel(), device=order.device)
    return result


def _order_by_slot(received: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows arrive by source, then slot; the order that groups them by slot, sources in rank order. [rows]"""
    ranks, slots = received.shape
    slot_of_block = torch.arange(slots, device=received.device).repeat(ranks)
    slot_of_row = torch.repeat_interleave(slot_of_block, received.reshape(-1), output_size=rows)
    return torch.argsort(slot_of_row, stable=True)
