"""What the plans of a step send, counted by level from numbers that the host has anyway."""

from __future__ import annotations

from typing import Any

import torch

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.levels import Places
from piper_hpc.comm.plan import Handle
from piper_hpc.spec.exchange import LEVELS, MOVES_PER_STEP
from piper_hpc.spec.placement import Placement


class Meter:
    """A dispatcher that notes where the rows of every dispatch go. places, rank: of the expert group, this rank's."""

    def __init__(self, dispatcher: FlatDispatcher | HaloDispatcher, places: Places, rank: int) -> None:
        self.dispatcher = dispatcher
        self._levels = [places.tier(rank, other) for other in range(places.ranks)]
        self._sent: list[tuple[list[int], int]] = []

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor, Any]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`."""
        rows, handle = self.dispatcher.dispatch(tokens, expert_ids, weights, placement)
        if isinstance(handle, Handle):
            sent = handle.plan.send_rows
        else:
            assert isinstance(self.dispatcher, HaloDispatcher)
            sent = self.dispatcher.rows_to(handle.plan)
        self._sent.append((sent, tokens.shape[-1] * tokens.element_size()))
        return rows, handle

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        return self.dispatcher.combine(rows, handle)

    def take(self) -> dict[str, float]:
        """Payload bytes by level that this rank sent since it was last asked, each plan carried out as in training."""
        total = dict.fromkeys(LEVELS, 0.0)
        for sent, row_bytes in self._sent:
            for level, rows in zip(self._levels, sent, strict=True):
                if level != "self":
                    total[level] += rows * row_bytes * MOVES_PER_STEP
        self._sent.clear()
        return total
