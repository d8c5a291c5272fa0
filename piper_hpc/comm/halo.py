"""The hierarchical dispatcher: HALO (Algorithm 1 of arXiv 2605.05049) for uneven splits, on two or three levels.

It exchanges first between racks or nodes, each rank with those of equal place (rails), then inside the node. With
`dedup` a token enters each domain once and is fanned out there, and what comes back for it is weighted and added up
before it leaves the domain. Without it, every number equals the flat dispatcher's bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.dedup import Fold, accumulator
from piper_hpc.comm.levels import Chains
from piper_hpc.comm.plan import inverse
from piper_hpc.comm.routes import RoutePlan, plan_routes
from piper_hpc.comm.tables import Tables, make_tables
from piper_hpc.comm.travel import Travel
from piper_hpc.comm.volume import Traffic, rows_to, volume
from piper_hpc.spec.exchange import CHUNKS, OVERLAP, Overlap
from piper_hpc.spec.placement import Placement


@dataclass(frozen=True)
class RouteHandle:
    """What `combine` needs. weights: [tokens, top_k]; of a deduplicated plan those of the choices that this rank passes
    on in the last leg of each route, [choices]. Both with their gradient."""

    plan: RoutePlan
    weights: torch.Tensor

    @property
    def offsets(self) -> torch.Tensor:
        """Where each local expert's rows end, int32 [experts_per_rank], on the rows' device."""
        return self.plan.offsets


class HaloDispatcher:
    """The model's `Dispatcher` over the levels of `chains`.

    channels: of this rank (`rank` in the expert group), one a level; chunks, overlap: see `spec.CHUNKS` and `Overlap`.
    Every rank of the group gives the same algorithm, places, chunks and overlap.
    """

    def __init__(
        self,
        chains: Chains,
        rank: int,
        channels: Sequence[Channel],
        *,
        dedup: bool,
        chunks: int = CHUNKS,
        overlap: Overlap = OVERLAP,
    ) -> None:
        self._chains, self._rank, self._chunks, self._dedup = chains, rank, chunks, dedup
        self._chain = chains.chain(rank)
        self._travel = Travel(channels, overlap)
        self._tables: dict[tuple[int, torch.device], Tables] = {}
        self._positions: dict[tuple[Placement, torch.device], torch.Tensor] = {}

    def plan(self, expert_ids: torch.Tensor, placement: Placement) -> RoutePlan:
        """Who sends what to whom for expert_ids int64 [tokens, top_k]: the half with counts. Collective."""
        slots, device = placement.experts_per_rank, expert_ids.device
        if (slots, device) not in self._tables:
            self._tables[slots, device] = make_tables(
                self._chains, self._rank, chunks=self._chunks, slots=slots, dedup=self._dedup, device=device
            )
        if (placement, device) not in self._positions:
            pairs = zip(placement.rank_of_expert, placement.slot_of_expert, strict=True)
            self._positions[placement, device] = torch.tensor([r * slots + s for r, s in pairs], device=device)
        return plan_routes(
            expert_ids,
            self._positions[placement, device],
            self._tables[slots, device],
            self._travel.channels,
            dedup=self._dedup,
            placement_version=placement.version,
        )

    def volume(self, plan: RoutePlan, *, row_bytes: int, weight_bytes: int) -> dict[str, Traffic]:
        """What this rank sends in one dispatch of `plan`, by tier; see `piper_hpc.comm.volume`."""
        return volume(plan, self._chain, self._chains.places, row_bytes=row_bytes, weight_bytes=weight_bytes)

    def rows_to(self, plan: RoutePlan) -> list[int]:
        """Rows that this rank sends to each rank of the group in one dispatch of `plan`."""
        return rows_to(plan, self._chain, self._chains.places.ranks)

    def dispatch(
        self,
        tokens: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        placement: Placement,
        plan: RoutePlan | None = None,
    ) -> tuple[torch.Tensor, RouteHandle]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`.

        plan: of the same expert_ids, to exchange no counts again; raises ValueError where it is of another placement.
        """
        plan = self.plan(expert_ids, placement) if plan is None else plan
        if plan.placement_version != placement.version:
            raise ValueError(
                f"a plan for placement {plan.placement_version} was given with placement {placement.version}"
            )
        if self._dedup:
            weights = Carry.apply(weights, plan, self._travel)
        rows: torch.Tensor = Dispatch.apply(tokens, plan, self._travel)
        return rows, RouteHandle(plan, weights)

    def combine(self, rows: torch.Tensor, handle: RouteHandle) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        plan = handle.plan
        if self._dedup:
            combined: torch.Tensor = Combine.apply(rows, handle.weights, plan, self._travel)
            return combined
        copies = Return.apply(rows, plan, self._travel).view(plan.tokens, plan.top_k, rows.shape[-1])
        return (copies * handle.weights.unsqueeze(-1)).sum(1)


class Dispatch(torch.autograd.Function):
    """Tokens to the rows of their experts; the backward is the unweighted combine of the same plan."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, plan: RoutePlan, travel: Travel) -> torch.Tensor:
        ctx.plan, ctx.travel = plan, travel
        return travel.outward(tokens, plan.first, plan, None)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        plan: RoutePlan = ctx.plan
        back, _ = ctx.travel.homeward(gradient, plan)
        if plan.sharing is None:
            copies = back.index_select(0, plan.place).view(plan.tokens, plan.top_k, *back.shape[1:])
            return copies.sum(1), None, None
        own, far = plan.sharing.own, plan.sharing.far
        added = own(back[: plan.own_rows]) + far(back[plan.own_rows :])
        return added.to(gradient.dtype), None, None


class Return(torch.autograd.Function):
    """Rows back as the copies [tokens * top_k, hidden] of their tokens; the backward dispatches copies."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, plan: RoutePlan, travel: Travel) -> torch.Tensor:
        ctx.plan, ctx.travel = plan, travel
        return travel.homeward(rows, plan)[0].index_select(0, plan.place)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.travel.outward(gradient, ctx.plan.order, ctx.plan, None), None, None


class Carry(torch.autograd.Function):
    """Weights [tokens, top_k] to the ranks that pass their choices on in a last leg, [choices] by route; the backward
    brings their gradients home, one number a choice."""

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, plan: RoutePlan, travel: Travel) -> torch.Tensor:
        assert plan.sharing is not None
        ctx.plan, ctx.travel, ctx.shape = plan, travel, weights.shape
        ordered = weights.reshape(-1).index_select(0, plan.order)
        far = ordered[plan.own_rows :]
        for parcel in plan.sharing.parcels:
            far = parcel.carry(far, travel.channels)
        return torch.cat((ordered[: plan.own_rows], far.index_select(0, plan.sharing.last)))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        plan: RoutePlan = ctx.plan
        assert plan.sharing is not None
        far = gradient[plan.own_rows :].index_select(0, inverse(plan.sharing.last))
        for parcel in reversed(plan.sharing.parcels):
            far = parcel.bring(far, ctx.travel.channels)
        home = torch.cat((gradient[: plan.own_rows], far))
        return home.index_select(0, plan.place).view(ctx.shape), None, None


class Combine(torch.autograd.Function):
    """Expert outputs and carried weights to the weighted sums [tokens, hidden] of a deduplicated plan.

    Sums are taken in a fixed order: of a node by position of the expert, then of the other nodes' sums by node, racks
    likewise, to which at last the own node's is added. The backward dispatches the sums' gradient, weighted, and takes
    the product with the outputs for each weight's.
    """

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, plan: RoutePlan, travel: Travel) -> torch.Tensor:
        assert plan.sharing is not None
        by_route = weights.split(plan.passed_on)

        def fold(route: int, given: torch.Tensor) -> torch.Tensor:
            sums = plan.routes[route][-1].undo
            assert isinstance(sums, Fold)
            return sums(given, by_route[route]).to(rows.dtype)

        back, outputs = travel.homeward(rows, plan, fold, keep=True)
        combined = plan.sharing.own(outputs[0], by_route[0])
        if len(plan.routes) > 1:
            combined += plan.sharing.far(back[plan.own_rows :])
        ctx.plan, ctx.travel = plan, travel
        ctx.save_for_backward(weights, *outputs)
        return combined.to(torch.promote_types(rows.dtype, weights.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        weights, *outputs = ctx.saved_tensors
        plan: RoutePlan = ctx.plan
        by_route, wide = weights.split(plan.passed_on), accumulator(weights.dtype)
        products: list[torch.Tensor] = [weights] * len(outputs)

        def weigh(route: int, given: torch.Tensor) -> torch.Tensor:
            products[route] = (given.to(wide) * outputs[route].to(wide)).sum(-1)
            return given * by_route[route].unsqueeze(-1).to(given.dtype)

        rows = ctx.travel.outward(gradient.to(outputs[0].dtype), plan.first, plan, weigh)
        return rows, torch.cat(products).to(weights.dtype), None, None
