"""One variant of the family on one rank, ready to run: what is timed, and what is checked and counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.channel import Channel
from piper_hpc.comm.family import Family
from piper_hpc.comm.plan import Handle
from piper_hpc.microbench.dispatch.cells import Variant
from piper_hpc.spec import LEVELS, Placement


@dataclass(frozen=True)
class Counted:
    """What this rank sends in one dispatch: payload by rank, [ranks], and metadata by level."""

    payload_to: list[int]
    metadata: dict[str, int]


class Contender:
    """One variant, ready to run."""

    def __init__(self, variant: Variant, family: Family, others: Mapping[str, Channel]) -> None:
        self.variant = variant
        self.dispatcher: FlatDispatcher | HaloDispatcher
        if variant.algorithm in others:
            self.dispatcher = FlatDispatcher.over(others[variant.algorithm], family.places.ranks)
        else:
            self.dispatcher = family.dispatcher(
                variant.algorithm, chunks=max(1, variant.chunks), overlap=variant.overlap
            )

    def run(self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: Placement) -> torch.Tensor:
        """What is timed: from tokens to combined tokens, with experts that do nothing."""
        rows, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        return self.dispatcher.combine(rows, handle)  # type: ignore[arg-type]

    def check(
        self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: Placement, rank: int
    ) -> tuple[torch.Tensor, Counted]:
        """The same with experts that scale by their id, so that a row at a wrong expert shows; and what it sent."""
        rows, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        sizes = torch.diff(handle.offsets, prepend=handle.offsets.new_zeros(1)).long()
        scale = torch.tensor([1 + expert / 64 for expert in placement.experts_of(rank)], device=rows.device)
        scaled = rows * scale.repeat_interleave(sizes)[:, None].to(rows.dtype)
        row_bytes = tokens.shape[1] * tokens.element_size()
        if isinstance(handle, Handle):
            counted = Counted([count * row_bytes for count in handle.plan.send_rows], dict.fromkeys(LEVELS, 0))
        else:
            assert isinstance(self.dispatcher, HaloDispatcher)
            sent = self.dispatcher.volume(handle.plan, row_bytes=row_bytes, weight_bytes=weights.element_size())
            counted = Counted(
                [count * row_bytes for count in self.dispatcher.rows_to(handle.plan)],
                {level: sent[level].metadata_bytes for level in LEVELS},
            )
        return self.dispatcher.combine(scaled, handle), counted  # type: ignore[arg-type]
