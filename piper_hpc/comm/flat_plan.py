"""The plan of the flat algorithm: which rows go to which rank, index arithmetic on the routing's device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch

from piper_hpc.comm.channel import Channel, wait_on_host
from piper_hpc.spec.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class FlatPlan:
    """One dispatch, computed once and used by dispatch, combine and the backward of both.

    order: choice (token * top_k + choice) of each row sent, int64 [tokens * top_k]; inverse_order: its inverse.
    send_rows, recv_rows: rows to and from each rank of the group, [ranks].
    expert_order: for each row as the experts get it its index among the rows as they arrived, int64 [rows];
    arrival_order: its inverse; both are None where rows arrive in order (a group of one).
    offsets: where each local expert's rows end, int32 [experts_per_rank].
    """

    top_k: int
    order: torch.Tensor
    inverse_order: torch.Tensor
    send_rows: list[int]
    recv_rows: list[int]
    expert_order: torch.Tensor | None
    arrival_order: torch.Tensor | None
    offsets: torch.Tensor


class Plan(Protocol):
    """A plan by which rows reach experts in one hop."""

    @property
    def offsets(self) -> torch.Tensor:
        """As in FlatPlan."""


PlanT = TypeVar("PlanT", bound=Plan)


@dataclass(frozen=True)
class FlatHandle(Generic[PlanT]):
    """What `combine` needs of its `dispatch`: the plan, and the weights [tokens, top_k] with their gradient. rows: see
    `piper_hpc.model.dispatcher.Handle`."""

    plan: PlanT
    weights: torch.Tensor
    rows: Callable[[torch.Tensor], torch.Tensor]

    @property
    def offsets(self) -> torch.Tensor:
        """Where each local expert's rows end, int32 [experts_per_rank], on the rows' device."""
        return self.plan.offsets


def plan_flat(
    expert_ids: torch.Tensor, position_of_expert: torch.Tensor, ranks: int, channel: Channel | None
) -> FlatPlan:
    """Plan the all-to-all of every (token, choice) of `expert_ids`, int64 [tokens, top_k]; collective over `channel`.

    position_of_expert: rank * experts_per_rank + slot of each logical expert, int64 [experts]. Rows by expert are sent
    to every rank in an all-to-all of counts, which the host waits for (see `wait_on_host`) and reads in one copy.
    """
    experts = position_of_expert.numel()
    positions = position_of_expert[expert_ids.reshape(-1)]
    order = torch.argsort(positions, stable=True)
    inverse_order = inverse(order)
    # Not bincount: on a GPU it reads the largest value on the host.
    sent = positions.new_zeros(experts).scatter_add_(0, positions, torch.ones_like(positions)).view(ranks, -1)
    if channel is None:
        rows = positions.numel()
        return FlatPlan(
            expert_ids.shape[-1], order, inverse_order, [rows], [rows], None, None, sent[0].cumsum(0).to(torch.int32)
        )
    received = torch.empty_like(sent)
    work = channel.all_to_all(received, sent, [1] * ranks, [1] * ranks)
    work.wait()
    wait_on_host([work])
    send_rows, recv_rows = torch.stack((sent.sum(1), received.sum(1))).tolist()
    expert_order = _order_by_slot(received, sum(recv_rows))
    return FlatPlan(
        top_k=expert_ids.shape[-1],
        order=order,
        inverse_order=inverse_order,
        send_rows=send_rows,
        recv_rows=recv_rows,
        expert_order=expert_order,
        arrival_order=inverse(expert_order),
        offsets=received.sum(0).cumsum(0).to(torch.int32),
    )


@lru_cache(maxsize=256)
def positions(placement: ExpertPlacement, device: torch.device) -> torch.Tensor:
    """rank * experts_per_rank + slot of each logical expert, int64 [experts], kept on the device."""
    per_rank = placement.experts_per_rank
    pairs = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
    return torch.tensor([rank * per_rank + slot for rank, slot in pairs], device=device)


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The inverse of a permutation, int64 of the same shape, without a sort."""
    result = torch.empty_like(order)
    result[order] = torch.arange(order.numel(), device=order.device)
    return result


def _order_by_slot(received: torch.Tensor, rows: int) -> torch.Tensor:
    """Order that groups rows by expert slot, sources in rank order, int64 [rows]; they arrive by source, then slot.

    received: rows from each rank for each slot, int64 [ranks, slots].
    """
    ranks, slots = received.shape
    slot_of_block = torch.arange(slots, device=received.device).repeat(ranks)
    slot_of_row = torch.repeat_interleave(slot_of_block, received.reshape(-1), output_size=rows)
    return torch.argsort(slot_of_row, stable=True)
