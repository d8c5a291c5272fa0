"""A dispatcher that counts the bytes it sends by level, from row counts that the host has anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from piper_hpc.comm.factory import DispatcherFactory, GroupDispatcher
from piper_hpc.comm.hierarchy import Places
from piper_hpc.comm.volume import volume
from piper_hpc.model.recompute import is_rerun
from piper_hpc.spec.all_to_all import ALL_TO_ALLS_PER_STEP, LEVELS
from piper_hpc.spec.expert_placement import ExpertPlacement


def _none() -> dict[str, float]:
    return dict.fromkeys(LEVELS, 0.0)


@dataclass(frozen=True)
class SentBytes:
    """Bytes sent to other ranks, by level. payload_bytes: rows; metadata_bytes: of deduplicated choices, row index,
    weight and in backward the weight's gradient."""

    payload_bytes: dict[str, float] = field(default_factory=_none)
    metadata_bytes: dict[str, float] = field(default_factory=_none)


class ByteCountingDispatcher:
    """A dispatcher that counts what every dispatch sends. places: of the expert group; rank: its index in the group;
    factories: what made groups for it, and for the expert groups of others."""

    def __init__(
        self, dispatcher: GroupDispatcher, places: Places, rank: int, factories: Sequence[DispatcherFactory] = ()
    ) -> None:
        self.dispatcher = dispatcher
        self._factories = factories
        self._places, self._rank = places, rank
        self._sent = SentBytes()

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> tuple[torch.Tensor, Any]:
        """See `piper_hpc.model.dispatcher.Dispatcher.dispatch`."""
        begun, handle = self.dispatcher.dispatch(tokens, expert_ids, weights, placement)
        # A forward that runs again sends rows there and back once more, and their gradients belong to the first.
        exchanges = ALL_TO_ALLS_PER_STEP // 2 if is_rerun() else ALL_TO_ALLS_PER_STEP
        # A weight is sent in dispatch and its gradient in the backward, in the same type; the index once.
        traffic = volume(
            self.dispatcher.sent(handle.plan),
            self._places,
            self._rank,
            row_bytes=tokens.shape[-1] * tokens.element_size(),
            weight_bytes=(1 if is_rerun() else 2) * weights.element_size(),
        )
        for level in LEVELS:
            self._sent.payload_bytes[level] += traffic[level].payload_bytes * exchanges
            self._sent.metadata_bytes[level] += traffic[level].metadata_bytes
        return begun, handle

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """See `piper_hpc.model.dispatcher.Dispatcher.combine`."""
        return self.dispatcher.combine(rows, handle)

    def close(self) -> None:
        """Destroy its groups; no all-to-all may be under way in them, and it is not used after."""
        for factory in self._factories:
            factory.close()

    def pop_sent_bytes(self) -> SentBytes:
        """Bytes sent by the dispatches of this rank since the last call; the counters start again from zero.

        Each dispatch counts as a training step carries it out: `ALL_TO_ALLS_PER_STEP` exchanges of its rows (dispatch
        and combine, forward and backward). Rows that combine returns count for the rank that dispatched them.
        """
        taken, self._sent = self._sent, SentBytes()
        return taken
