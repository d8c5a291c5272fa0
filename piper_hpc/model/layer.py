"""One layer of the model as the spec has it at its index: attention, and a feed-forward that is dense or of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from piper_hpc.model.attention import Attention
from piper_hpc.model.dispatcher import Dispatcher
from piper_hpc.model.experts import Experts
from piper_hpc.model.feed_forward import FeedForward, SharedExperts
from piper_hpc.model.latent_attention import LatentAttention
from piper_hpc.model.norms import make_norm
from piper_hpc.model.recompute import again_whole, kept
from piper_hpc.model.router import Routed, Router
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.recompute import Recompute


@dataclass(frozen=True)
class LayerSettings:
    """What all layers of a stage share. aux_scale: see `Router`; recompute: what is computed again in the backward;
    overlap_shared: whether shared experts run while routed rows, or their gradients, are on their way."""

    sequence: int
    aux_scale: float
    dispatcher: Dispatcher
    recorder: Recorder
    recompute: Recompute
    device: torch.device
    dtype: torch.dtype
    overlap_shared: bool = True


class Layer(nn.Module):
    """Pre-norm attention with its residual, and what `feed_forward` of a subclass adds; its regions are timed."""

    def __init__(self, spec: ModelSpec, index: int, settings: LayerSettings) -> None:
        super().__init__()
        self.recorder = settings.recorder
        self.run = again_whole if settings.recompute.full else kept
        kind = LatentAttention if spec.attention == "mla" else Attention
        again = bool(settings.recompute.attention)
        placed: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
        self.attention_norm = make_norm(spec, spec.hidden, **placed)
        self.attention: nn.Module = kind(spec, index, settings.sequence, again=again, **placed)

    def attend(self, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of the normalised input, plus the input: [batch, sequence, hidden] -> the same shape."""
        return hidden + self.attention(self.attention_norm(hidden))


class DenseLayer(Layer):
    """Attention and one feed-forward."""

    def __init__(self, spec: ModelSpec, index: int, settings: LayerSettings) -> None:
        super().__init__(spec, index, settings)
        placed: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
        again = bool(settings.recompute.activation)
        self.ffn_norm = make_norm(spec, spec.hidden, **placed)
        self.ffn = FeedForward(spec, spec.dense_ffn, spec.dense_matrices, again=again, **placed)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        return self.run(self._forward, hidden)

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.recorder.timed("attention", self.attend, hidden)
        return self.recorder.timed("expert", lambda h: h + self.ffn(self.ffn_norm(h)), hidden)


class MoELayer(Layer):
    """Attention and routed experts, with shared experts or a dense residual beside them where the spec has them.

    The dense residual (Arctic) follows attention, and experts are given the layer's input instead.
    Since `reset`, `routed` has the choices of each expert by micro-batch, int64 [experts] each, and `aux_loss` adds up:
    both are counted where the forward ends, so that what is computed again counts once. forced: experts of every
    micro-batch's tokens, int64 [batch * sequence, top_k] each, whatever the router says; forwards come in the order of
    micro-batches.
    """

    def __init__(self, spec: ModelSpec, index: int, settings: LayerSettings, placement: ExpertPlacement) -> None:
        super().__init__(spec, index, settings)
        placed: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
        again = bool(settings.recompute.activation)
        self.residual: FeedForward | None = None
        if spec.dense_residual_ffn:
            self.residual_norm = make_norm(spec, spec.hidden, **placed)
            self.residual = FeedForward(spec, spec.dense_residual_ffn, spec.dense_matrices, again=again, **placed)
        self.router_norm = make_norm(spec, spec.hidden, **placed)
        self.router = Router(spec, settings.aux_scale, **placed)
        self.experts = Experts(spec, placement.experts_per_rank, again=again, **placed)
        self.shared = SharedExperts(spec, again=again, **placed) if spec.shared_experts else None
        self.weighted_input, self.overlap_shared = spec.weighted_input, settings.overlap_shared
        self.dispatcher, self.placement = settings.dispatcher, placement
        self.forced: Sequence[torch.Tensor] | None = None
        self.routed: list[torch.Tensor] = []
        self.aux_loss = torch.zeros((), dtype=torch.float64, device=settings.device)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        forced = None if self.forced is None else self.forced[len(self.routed)]
        result, counts, aux_loss = self.run(partial(self._forward, forced), hidden)
        self.routed.append(counts)
        self.aux_loss += aux_loss
        return result

    def reset(self) -> None:
        """Begin a new step's sums."""
        self.routed.clear()
        self.aux_loss.zero_()

    def _forward(
        self, forced: torch.Tensor | None, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        timed = self.recorder.timed
        given, hidden = hidden, timed("attention", self.attend, hidden)
        if self.residual is not None:
            hidden = timed("expert", self._add_residual, hidden)
        else:
            given = hidden
        tokens, *found = timed("router", partial(self._route, forced), given)
        routed = Routed(*found)
        if self.shared is None or not self.overlap_shared:
            rows, handle = timed("dispatch", partial(self._dispatch_and_wait, routed), tokens)
            beside = [] if self.shared is None else [timed("expert", self.shared, tokens)]
        else:
            begun, handle = timed("dispatch", partial(self._dispatch, routed), tokens)
            beside = [timed("expert", self.shared, tokens)]
            rows = timed("dispatch", handle.rows, begun)
        rows = timed("expert", lambda r: self.experts(r, handle.offsets), rows)

        def combine(rows: torch.Tensor, hidden: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
            mixed = sum(beside, self.dispatcher.combine(rows, handle))
            return hidden + mixed.view_as(hidden)

        return timed("combine", combine, rows, hidden, *beside), routed.counts, routed.aux_loss

    def _add_residual(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.residual is not None
        return hidden + self.residual(self.residual_norm(hidden))

    def _route(self, forced: torch.Tensor | None, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalised tokens [batch * sequence, hidden], and what the router makes of them (`Routed`)."""
        normalised = self.router_norm(hidden)
        return normalised.flatten(0, 1), *self.router(normalised, forced)

    def _dispatch(self, routed: Routed, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        weights = routed.weights
        if self.weighted_input:  # of one expert a token
            tokens, weights = tokens * weights, torch.ones_like(weights)
        return self.dispatcher.dispatch(tokens, routed.expert_ids, weights, self.placement)

    def _dispatch_and_wait(self, routed: Routed, tokens: torch.Tensor) -> tuple[torch.Tensor, Any]:
        begun, handle = self._dispatch(routed, tokens)
        return handle.rows(begun), handle


def make_layer(
    spec: ModelSpec, index: int, settings: LayerSettings, placement: ExpertPlacement
) -> DenseLayer | MoELayer:
    """Layer `index` of the model. placement: which rank of the expert group holds which of its experts."""
    return MoELayer(spec, index, settings, placement) if spec.is_moe(index) else DenseLayer(spec, index, settings)
