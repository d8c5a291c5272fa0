"""One variant on one rank, ready to run: what is timed, and what is checked and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.channel import Channel
from piper_hpc.comm.factory import DispatcherFactory, GroupDispatcher
from piper_hpc.comm.volume import Sent
from piper_hpc.microbench.dispatch.cells import Variant
from piper_hpc.spec import ExpertPlacement


class VariantRunner:
    """One variant, ready to run. others: channels over which flat is run, by the algorithm's name in the rows (mpi)."""

    def __init__(self, variant: Variant, factory: DispatcherFactory, others: Mapping[str, Channel]) -> None:
        self.variant = variant
        self.dispatcher: GroupDispatcher
        if variant.algorithm in others:
            self.dispatcher = FlatDispatcher.over(others[variant.algorithm], factory.places.ranks)
        else:
            self.dispatcher = factory.dispatcher(
                variant.algorithm, chunks=max(1, variant.chunks), overlap=variant.overlap
            )

    def run(
        self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> torch.Tensor:
        """What is timed: tokens [tokens, hidden] to combined tokens, with experts that return what they get. ids,
        weights: [tokens, top_k]."""
        begun, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        return self.dispatcher.combine(handle.rows(begun), handle)

    def check(
        self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement, rank: int
    ) -> tuple[torch.Tensor, Sequence[Sent]]:
        """The same with experts that scale by their id, so that a row at a wrong expert shows; and what this rank,
        `rank` of the group, sent in dispatch."""
        begun, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        rows = handle.rows(begun)
        sizes = torch.diff(handle.offsets, prepend=handle.offsets.new_zeros(1)).long()
        scale = torch.tensor([1 + expert / 64 for expert in placement.experts_of(rank)], device=rows.device)
        scaled = rows * scale.repeat_interleave(sizes)[:, None].to(rows.dtype)
        return self.dispatcher.combine(scaled, handle), self.dispatcher.sent(handle.plan)
