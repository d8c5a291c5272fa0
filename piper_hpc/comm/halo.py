"""The hierarchical dispatcher: HALO (Algorithm 1 of arXiv 2605.05049) for uneven splits, on two or three levels.

It does an all-to-all between racks or nodes first, each rank with those on its rail, then one inside the node. With
`dedup` a token enters each domain once and is copied there, and what comes back for it is weighted and added up before
it leaves the domain. Without it, every number equals the flat dispatcher's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.dedup import SegmentSum, accumulator
from piper_hpc.comm.exchange import Exchange, Finish, begin_exchange, finish_exchange
from piper_hpc.comm.flat_plan import inverse
from piper_hpc.comm.hierarchical_plan import HierarchicalPlan, plan_hierarchical
from piper_hpc.comm.hierarchy import Hierarchy
from piper_hpc.comm.tables import Tables, make_tables
from piper_hpc.comm.transport import Transport
from piper_hpc.comm.volume import Sent
from piper_hpc.spec.all_to_all import CHUNKS, OVERLAP, Overlap
from piper_hpc.spec.expert_placement import ExpertPlacement


@dataclass(frozen=True)
class HierarchicalHandle:
    """What `combine` needs of its `dispatch`. weights: [tokens, top_k]; of a deduplicated plan those of the choices
    that this rank sends at the last level, [choices] part by part. Both with their gradient. rows: see
    `piper_hpc.model.dispatcher.Handle`."""

    plan: HierarchicalPlan
    weights: torch.Tensor
    rows: Callable[[torch.Tensor], torch.Tensor]

    @property
    def offsets(self) -> torch.Tensor:
        """Where each local expert's rows end, int32 [experts_per_rank], on the rows' device."""
        return self.plan.offsets


class HaloDispatcher:
    """The model's `Dispatcher` over the levels of `hierarchy`; its arguments: see `piper_hpc.comm.factory.Build`."""

    def __init__(
        self,
        hierarchy: Hierarchy,
        rank: int,
        channels: Sequence[Channel],
        *,
        dedup: bool,
        chunks: int = CHUNKS,
        overlap: Overlap = OVERLAP,
    ) -> None:
        self._hierarchy, self._rank, self._chunks, self._dedup = hierarchy, rank, chunks, dedup
        self._chain = hierarchy.chain(rank)
        self._transport = Transport(channels, overlap)
        self._tables: dict[tuple[int, torch.device], Tables] = {}
        self._positions: dict[tuple[ExpertPlacement, torch.device], torch.Tensor] = {}

    def plan(self, expert_ids: torch.Tensor, placement: ExpertPlacement) -> HierarchicalPlan:
        """The plan for expert_ids int64 [tokens, top_k]: all that needs counts. Collective."""
        slots, device = placement.experts_per_rank, expert_ids.device
        if (slots, device) not in self._tables:
            self._tables[slots, device] = make_tables(
                self._hierarchy, self._rank, chunks=self._chunks, slots=slots, dedup=self._dedup, device=device
            )
        if (placement, device) not in self._positions:
            pairs = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
            self._positions[placement, device] = torch.tensor([r * slots + s for r, s in pairs], device=device)
        return plan_hierarchical(
            expert_ids,
            self._positions[placement, device],
            self._tables[slots, device],
            self._transport.channels,
            dedup=self._dedup,
            placement_version=placement.version,
        )

    def dispatch(
        self,
        tokens: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        placement: ExpertPlacement,
        plan: HierarchicalPlan | None = None,
    ) -> tuple[torch.Tensor, HierarchicalHandle]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`.

        plan: of the same expert_ids, to send no counts again; raises ValueError where it is of another placement.
        """
        plan = self.plan(expert_ids, placement) if plan is None else plan
        if plan.placement_version != placement.version:
            raise ValueError(
                f"a plan for placement {plan.placement_version} was given with placement {placement.version}"
            )
        if self._dedup:
            weights = DispatchWeights.apply(weights, plan, self._transport)
        exchange = rows_of(plan, self._transport)
        handle = HierarchicalHandle(plan, weights, partial(finish_exchange, exchange=exchange))
        return begin_exchange(tokens, exchange), handle

    def combine(self, rows: torch.Tensor, handle: HierarchicalHandle) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        plan = handle.plan
        if self._dedup:
            combined: torch.Tensor = CombineSums.apply(rows, handle.weights, plan, self._transport)
            return combined
        copies = CombineCopies.apply(rows, plan, self._transport).view(plan.tokens, plan.top_k, rows.shape[-1])
        return (copies * handle.weights.unsqueeze(-1)).sum(1)

    def sent(self, plan: HierarchicalPlan) -> list[Sent]:
        """See `piper_hpc.comm.factory.GroupDispatcher.sent`."""
        groups = [hop.group for hop in self._chain.hops]
        rows = [
            Sent(peer, rows=count)
            for transfers in plan.parts
            for transfer in transfers
            for peer, count in zip(groups[transfer.level], transfer.send, strict=True)
        ]
        return rows + [
            Sent(peer, choices=count)
            for transfer in (plan.dedup.metadata if plan.dedup is not None else ())
            for peer, count in zip(groups[transfer.level], transfer.send, strict=True)
        ]


def rows_of(plan: HierarchicalPlan, transport: Transport) -> Exchange:
    """The exchange of tokens [tokens, hidden] for the rows of experts [rows, hidden]; backward, of their gradients by
    an unweighted combine."""

    def forward(tokens: torch.Tensor) -> Finish:
        return transport.begin_dispatch(tokens, plan.send_tokens, plan)

    def backward(gradient: torch.Tensor) -> Finish:
        rest = transport.begin_combine(gradient, plan)

        def finish() -> torch.Tensor:
            rows, _ = rest()
            if plan.dedup is None:
                copies = rows.index_select(0, plan.inverse_order).view(plan.tokens, plan.top_k, *rows.shape[1:])
                return copies.sum(1)
            added = plan.dedup.local(rows[: plan.local_rows]) + plan.dedup.remote(rows[plan.local_rows :])
            return added.to(gradient.dtype)

        return finish

    return Exchange(forward, backward)


class CombineCopies(torch.autograd.Function):
    """Rows [rows, hidden] back as the copies [tokens * top_k, hidden] of their tokens; the backward dispatches them."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: HierarchicalPlan, transport: Transport) -> torch.Tensor:
        ctx.plan, ctx.transport = plan, transport
        return transport.begin_combine(rows, plan)()[0].index_select(0, plan.inverse_order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.transport.begin_dispatch(gradient, ctx.plan.order, ctx.plan)(), None, None


class DispatchWeights(torch.autograd.Function):
    """Weights [tokens, top_k] to the ranks that send their choices at the last level, [choices] part by part; the
    backward sends their gradients back, one number a choice."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, plan: HierarchicalPlan, transport: Transport) -> torch.Tensor:
        assert plan.dedup is not None
        ctx.plan, ctx.transport, ctx.shape = plan, transport, weights.shape
        ordered = weights.reshape(-1).index_select(0, plan.order)
        remote = ordered[plan.local_rows :]
        for transfer in plan.dedup.metadata:
            remote = transfer.dispatch(remote, transport.channels)
        return torch.cat((ordered[: plan.local_rows], remote.index_select(0, plan.dedup.last_order)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        plan: HierarchicalPlan = ctx.plan
        assert plan.dedup is not None
        remote = gradient[plan.local_rows :].index_select(0, inverse(plan.dedup.last_order))
        for transfer in reversed(plan.dedup.metadata):
            remote = transfer.combine(remote, ctx.transport.channels)
        ordered = torch.cat((gradient[: plan.local_rows], remote))
        return ordered.index_select(0, plan.inverse_order).view(ctx.shape), None, None


class CombineSums(torch.autograd.Function):
    """Expert outputs [rows, hidden] and dispatched weights [choices] to weighted sums [tokens, hidden], deduplicated.

    Sums are taken in a fixed order: of a node by logical expert, then of the other nodes' sums by node, racks
    likewise, to which at last the own node's is added. The backward dispatches the sums' gradient, weighted, and takes
    its product with the outputs for each weight's.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weights: torch.Tensor, plan: HierarchicalPlan, transport: Transport
    ) -> torch.Tensor:
        assert plan.dedup is not None
        weights_of = weights.split(plan.last_sends)

        def reduce(part: int, outputs: torch.Tensor) -> torch.Tensor:
            sums = plan.parts[part][-1].unpack
            assert isinstance(sums, SegmentSum)
            return sums(outputs, weights_of[part]).to(rows.dtype)

        returned, outputs = transport.begin_combine(rows, plan, reduce, keep=True)()
        combined = plan.dedup.local(outputs[0], weights_of[0])
        if len(plan.parts) > 1:
            combined += plan.dedup.remote(returned[plan.local_rows :])
        ctx.plan, ctx.transport = plan, transport
        ctx.save_for_backward(weights, *outputs)
        return combined.to(torch.promote_types(rows.dtype, weights.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weights, *outputs = ctx.saved_tensors
        plan: HierarchicalPlan = ctx.plan
        weights_of, wide = weights.split(plan.last_sends), accumulator(weights.dtype)
        products: list[torch.Tensor] = [weights] * len(outputs)

        def weight(part: int, gradients: torch.Tensor) -> torch.Tensor:
            products[part] = (gradients.to(wide) * outputs[part].to(wide)).sum(-1)
            return gradients * weights_of[part].unsqueeze(-1).to(gradients.dtype)

        rows = ctx.transport.begin_dispatch(gradient.to(outputs[0].dtype), plan.send_tokens, plan, weight)()
        return rows, torch.cat(products).to(weights.dtype), None, None
