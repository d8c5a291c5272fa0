"""One pipeline stage of the transformer: embedding, layers and head as its place in the pipeline demands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from piper_hpc.model.attention import Attention
from piper_hpc.model.dispatcher import Dispatcher
from piper_hpc.model.experts import Experts
from piper_hpc.model.recompute import again_whole, kept
from piper_hpc.model.router import Router
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.recompute import Recompute


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm routed experts, each with its residual; its regions are timed."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        sequence: int,
        aux_scale: float,
        dispatcher: Dispatcher,
        placement: ExpertPlacement,
        recorder: Recorder,
        recompute: Recompute,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(spec, sequence, again=bool(recompute.attention), device=device, dtype=dtype)
        self.router_norm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps, device=device, dtype=dtype)
        self.router = Router(spec, aux_scale, device=device, dtype=dtype)
        self.experts = Experts(
            spec, placement.experts_per_rank, again=bool(recompute.activation), device=device, dtype=dtype
        )
        self.run = again_whole if recompute.full else kept
        self.dispatcher = dispatcher
        self.placement = placement
        self.recorder = recorder

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [batch, sequence, hidden] -> the same shape."""
        return self.run(self._forward, hidden)

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        timed = self.recorder.timed
        hidden = timed("attention", self.attend, hidden)
        tokens, expert_ids, weights = timed("router", self.route, hidden)
        rows, handle = timed(
            "dispatch", lambda t: self.dispatcher.dispatch(t, expert_ids, weights, self.placement), tokens
        )
        rows = timed("expert", lambda r: self.experts(r, handle.offsets), rows)
        return timed("combine", lambda r: hidden + self.dispatcher.combine(r, handle).view_as(hidden), rows)

    def attend(self, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of the normalised input, plus the input: [batch, sequence, hidden] -> the same shape."""
        return hidden + self.attention(self.attention_norm(hidden))

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised tokens [batch * sequence, hidden], their expert ids and weights [batch * sequence, top_k]."""
        normalised = self.router_norm(hidden)
        return normalised.flatten(0, 1), *self.router(normalised)


class Stage(nn.Module):
    """The layers `layers` of the model, with the embedding before the first and the head after the last.

    Parameters carry global names (`layers.3.attention.q.weight`), so that no layout shows in them.
    aux_scale: see `Router`. dispatcher: of this rank's expert group; placements: by global layer, which rank of that
    group holds which expert. recompute: what of each layer is computed again in the backward.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: Iterable[int],
        *,
        sequence: int,
        aux_scale: float,
        dispatcher: Dispatcher,
        placements: Sequence[ExpertPlacement],
        recorder: Recorder,
        recompute: Recompute,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        indices = list(layers)
        self.recorder = recorder
        self.embedding: nn.Embedding | None = None
        self.norm: nn.RMSNorm | None = None
        self.head: nn.Linear | None = None
        if indices[0] == 0:
            self.embedding = nn.Embedding(spec.vocab, spec.hidden, device=device, dtype=dtype)
        self.layers = nn.ModuleDict(
            {
                str(index): Layer(
                    spec,
                    sequence=sequence,
                    aux_scale=aux_scale,
                    dispatcher=dispatcher,
                    placement=placements[index],
                    recorder=recorder,
                    recompute=recompute,
                    device=device,
                    dtype=dtype,
                )
                for index in indices
            }
        )
        if indices[-1] == spec.layers - 1:
            self.norm = nn.RMSNorm(spec.hidden, eps=spec.norm_eps, device=device, dtype=dtype)
            self.head = nn.Linear(spec.hidden, spec.vocab, bias=False, device=device, dtype=dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """First stage: token ids int64 [batch, sequence], others hidden states [batch, sequence, hidden].

        Returns logits [batch, sequence, vocab] on the last stage, hidden states on the others.
        """
        timed = self.recorder.timed
        hidden = inputs if self.embedding is None else timed("head", self.embedding, inputs)
        for layer in self.layers.values():
            hidden = layer(hidden)
        if self.norm is None or self.head is None:
            return hidden
        norm, head = self.norm, self.head
        return timed("head", lambda h: head(norm(h)), hidden)

    def place(self, placements: Sequence[ExpertPlacement]) -> None:
        """From the next forward on dispatch to where experts are then; placements: by global layer."""
        for index, layer in self.layers.items():
            assert isinstance(layer, Layer)
            layer.placement = placements[int(index)]

    def routers(self) -> dict[int, Router]:
        """The router of each layer of this stage, by global layer index."""
        return {int(index): layer.router for index, layer in self.layers.items() if isinstance(layer, Layer)}
