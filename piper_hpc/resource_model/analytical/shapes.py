"""Tokens, rows, experts and heads of one rank and micro-batch: the sizes that all formulas here start from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from piper_hpc.resource_model.all_to_all import AllToAllRouting
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Degrees, ModelSpec, Workload


@dataclass(frozen=True)
class Shapes:
    """Sizes of one rank, of one layout or (as broadcasting arrays) of a grid of layouts.

    tokens: inside tensor-parallel regions, micro_batch * sequence / cp; local_tokens: outside them, a tp-th of it
    with sequence parallelism; rows: copies of tokens that the rank's experts compute, all etp shards of a group
    compute the same rows with 1/etp of the width. `busiest_rows` is the same on the most loaded rank.
    """

    model: ModelSpec
    layout: Degrees
    workload: Workload
    sequence_parallel: bool = True

    @property
    def value_bytes(self) -> int:
        """Bytes of one activation value."""
        return self.workload.recipe.value_bytes

    @property
    def tokens(self) -> Number:
        """Tokens of one rank in tensor-parallel regions."""
        return self.layout.micro_batch * self.workload.sequence / self.layout.cp

    @property
    def local_tokens(self) -> Number:
        """Tokens of one rank outside of tensor-parallel regions."""
        return self.tokens / self.layout.tp if self.sequence_parallel else self.tokens

    @property
    def routed_tokens(self) -> Number:
        """Tokens that one rank routes: each of a tensor-parallel group routes its own share."""
        return self.tokens / self.layout.tp

    @property
    def sent_rows(self) -> Number:
        """Rows that one rank dispatches."""
        return self.routed_tokens * self.model.top_k * self.workload.routing.kept

    @property
    def rows(self) -> Number:
        """Rows that one rank's experts compute, on average: the dispatched rows of its etp group."""
        return self.sent_rows * self.layout.etp

    @property
    def busiest_rows(self) -> Number:
        """Rows that the most loaded rank's experts compute."""
        return self.rows * self.workload.routing.load(self.layout.ep)

    @property
    def all_to_all_routing(self) -> AllToAllRouting:
        """What dispatch and combine depend on."""
        model, routing = self.model, self.workload.routing
        shares = routing.histogram if routing.mode == "dropless" else ()
        return AllToAllRouting(
            model.experts,
            model.top_k,
            model.expert_groups,
            model.groups_per_token,
            imbalance=routing.load(self.layout.ep),
            shares=shares,
        )

    @property
    def experts_per_rank(self) -> Number:
        """Routed experts that one rank holds."""
        return self.model.experts / self.layout.ep

    @property
    def kv_heads(self) -> Number:
        """Key-value heads of one rank: copied where there are fewer than tensor-parallel ranks."""
        return np.maximum(self.model.kv_heads / self.layout.tp, 1.0)
