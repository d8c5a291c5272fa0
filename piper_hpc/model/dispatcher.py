"""The interface between the model and the all-to-all of tokens: every algorithm implements it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from piper_hpc.spec.expert_placement import ExpertPlacement


class Handle(Protocol):
    """What a dispatcher keeps from `dispatch` for `combine`, of which the experts see where their rows end."""

    @property
    def offsets(self) -> torch.Tensor:
        """Where each local expert's rows end, int32 [experts_per_rank], on the rows' device."""

    @property
    def rows(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Given what `dispatch` returned, waits for the rows that were sent here, [rows, hidden] grouped by slot: as
        many as all ranks of the expert group sent. To be called once; what is computed before is so while rows are on
        their way, and its backward while their gradients are."""


class Dispatcher(Protocol):
    """Sends tokens to the experts they chose and brings the results back, differentiably."""

    def dispatch(
        self, tokens: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, placement: ExpertPlacement
    ) -> tuple[torch.Tensor, Handle]:
        """Send tokens on their way to their experts.

        tokens [tokens, hidden]; expert_ids int64 [tokens, top_k], logical; weights [tokens, top_k]. Returns a tensor
        for `handle.rows`, of whatever shape, which carries the gradient; and the handle.
        """

    def combine(self, rows: torch.Tensor, handle: Any) -> torch.Tensor:
        """The weighted sum of each token's expert outputs, [tokens, hidden]; rows as `handle.rows` delivered them."""
