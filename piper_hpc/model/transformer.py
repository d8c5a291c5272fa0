"""One pipeline stage of the transformer: embedding, layers and head as its place in the pipeline demands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from piper_hpc.model.dispatcher import Dispatcher
from piper_hpc.model.layer import LayerSettings, MoELayer, make_layer
from piper_hpc.model.norms import make_norm
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.recompute import Recompute


class Stage(nn.Module):
    """The layers `layers` of the model, with the embedding before the first and the head after the last.

    Parameters carry global names (`layers.3.attention.q.weight`), so that no layout shows in them. A tied head is the
    embedding's own matrix: the whole model is then one stage.
    aux_scale: see `Router`. dispatcher: of this rank's expert group; placements: by global layer, which rank of that
    group holds which expert. recompute: what of each layer is computed again in the backward. overlap_shared: see
    `piper_hpc.spec.layout.Layout`.
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
        overlap_shared: bool = True,
    ) -> None:
        super().__init__()
        indices = list(layers)
        self.recorder = recorder
        self.embedding: nn.Embedding | None = None
        self.norm: nn.Module | None = None
        self.head: nn.Linear | None = None
        if indices[0] == 0:
            self.embedding = nn.Embedding(spec.vocab, spec.hidden, device=device, dtype=dtype)
        settings = LayerSettings(sequence, aux_scale, dispatcher, recorder, recompute, device, dtype, overlap_shared)
        self.layers = nn.ModuleDict(
            {str(index): make_layer(spec, index, settings, placements[index]) for index in indices}
        )
        if indices[-1] == spec.layers - 1:
            self.norm = make_norm(spec, spec.hidden, device=device, dtype=dtype)
            self.head = nn.Linear(spec.hidden, spec.vocab, bias=spec.head_bias, device=device, dtype=dtype)
            if spec.tied_embeddings and self.embedding is not None:
                self.head.weight = self.embedding.weight

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
        for index, layer in self.moe_layers().items():
            layer.placement = placements[index]

    def moe_layers(self) -> dict[int, MoELayer]:
        """The layers of this stage that have experts, by global index."""
        return {int(index): layer for index, layer in self.layers.items() if isinstance(layer, MoELayer)}

    def state(self) -> dict[str, torch.Tensor]:
        """What training changes beside parameters, by global name: the state of routers, alike on a stage's ranks."""
        return {
            f"layers.{index}.router.{name}": tensor
            for index, layer in self.moe_layers().items()
            for name, tensor in layer.router.named_buffers()
        }
