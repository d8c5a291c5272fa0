"""What the plans of a step send, counted by level from numbers that the host has anyway."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.levels import Places
from piper_hpc.comm.plan import Handle
from piper_hpc.spec.exchange import LEVELS, MOVES_PER_STEP
from piper_hpc.spec.placement import Placement


def _none() -> dict[str, float]:
    return dict.fromkeys(LEVELS, 0.0)


@dataclass(frozen=True)
class Sent:
    """Bytes by level that left for other ranks. payload_bytes: rows; metadata_bytes: what deduplicated choices take
    along, row index, weight and on the way back the weight's gradient."""

    payload_bytes: dict[str, float] = field(default_factory=_none)
    metadata_bytes: dict[str, float] = field(default_factory=_none)


class Meter:
    """A dispatcher that notes where the rows of every dispatch go. places, rank: of the expert group, this rank's."""

    def __init__(self, dispatcher: FlatDispatcher | HaloDispatcher, places: Places, rank: int) -> None:
        self.dispatcher = dispatcher
        self._levels = [places.tier(rank, other) for other in range(places.ranks)]
        self._sent = Sent()

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: Placement
    ) -> tuple[torch.Tensor, Any]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`."""
        rows, handle = self.dispatcher.dispatch(tokens, expert_ids, weights, placement)
        row_bytes, payload = tokens.shape[-1] * tokens.element_size(), self._sent.payload_bytes
        if isinstance(handle, Handle):
            for level, sent in zip(self._levels, handle.plan.send_rows, strict=True):
                if level != "self":
                    payload[level] += sent * row_bytes * MOVES_PER_STEP
        else:
            assert isinstance(self.dispatcher, HaloDispatcher)
            # A weight travels out and its gradient home, in the same type; the index once.
            both = 2 * weights.element_size()
            traffic = self.dispatcher.volume(handle.plan, row_bytes=row_bytes, weight_bytes=both)
            for level in LEVELS:
                payload[level] += traffic[level].payload_bytes * MOVES_PER_STEP
                self._sent.metadata_bytes[level] += traffic[level].metadata_bytes
        return rows, handle

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        return self.dispatcher.combine(rows, handle)

    def take(self) -> Sent:
        """What the plans that this rank made since it was last asked send, each carried out as in a step of training;
        what comes back by a plan counts for the rank that made it."""
        taken, self._sent = self._sent, Sent()
        return taken
