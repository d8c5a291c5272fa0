"""Routing that a run is given in place of its router's choice, for measurements: the workloads W0 to W7."""

from __future__ import annotations

import torch

from piper_hpc.spec import Workload
from piper_hpc.spec.layout import Layout, RankPlace
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.routing_workloads import global_draw


class ForcedRouting:
    """One global draw a step and layer, of which a rank takes its own tokens: the same routing under every layout.

    W1's hot experts are those of one step and stay; what turns or bursts does so with the steps.
    """

    def __init__(
        self, name: str, model: ModelSpec, layout: Layout, workload: Workload, place: RankPlace, seed: int
    ) -> None:
        share = workload.global_batch // layout.dense_dp
        first = share * (place.replica * layout.ep + place.shard)
        self._name, self._model, self._seed = name, model, seed
        self._tokens, self._sequence = workload.tokens, workload.sequence
        self._mine = slice(first * workload.sequence, (first + share) * workload.sequence)
        self._of_micro_batch = layout.micro_batch * workload.sequence

    def ids(self, step: int, layer: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Experts of this rank's tokens by micro-batch, int64 [tokens, top_k] each."""
        drawn = global_draw(
            self._name,
            experts=self._model.experts,
            top_k=self._model.top_k,
            tokens=self._tokens,
            step=step,
            seed=self._seed * self._model.layers + layer,
            hot_step=0 if self._name == "W1" else None,
        )
        return torch.from_numpy(drawn[self._mine].copy()).to(device).split(self._of_micro_batch)
