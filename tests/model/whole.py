"""A whole model as one stage on one rank, and its parameters by logical name."""

from __future__ import annotations

import torch

from piper_hpc.comm import FlatDispatcher
from piper_hpc.model import Stage
from piper_hpc.model.names import logical_tensors
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import ModelSpec, Recompute
from piper_hpc.spec.expert_placement import ExpertPlacement


def whole_model(spec: ModelSpec, sequence: int, recompute: str = "none") -> Stage:
    """recompute: as the layout's."""
    return Stage(
        spec,
        range(spec.layers),
        sequence=sequence,
        aux_scale=0.0,
        dispatcher=FlatDispatcher(),
        placements=[ExpertPlacement.linear(spec.experts, 1)] * spec.layers,
        recorder=Recorder(CpuClock()),
        recompute=Recompute.parse(recompute),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def logical(stage: Stage, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The parameters of a whole model by logical name."""
    return dict(logical_tensors(stage.named_parameters(), [range(spec.experts)] * spec.layers))
