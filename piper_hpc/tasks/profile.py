"""task=profile: train a few steps and write where their time went, rank by rank, as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from piper_hpc.profiling.spans import Span
from piper_hpc.profiling.trace import write_trace
from piper_hpc.tasks import train
from piper_hpc.tasks.context import Context
from piper_hpc.train.settings import WARMUP_STEPS


def run(context: Context) -> None:
    """Train `task.profile_steps` steps after the ones that warm up; rank 0 writes `trace.json`."""
    calibration = train.prepare(context)
    steps = WARMUP_STEPS + context.experiment.task.profile_steps
    kept: list[tuple[int, Sequence[Span]]] = []
    train.execute(context, calibration, steps, kept)
    mine = [span for step, spans in kept if step >= WARMUP_STEPS for span in spans]
    everyone: list[Any] | None = [None] * context.rank_env.ranks if context.is_first else None
    dist.gather_object(mine, everyone)
    if everyone is not None:
        places = context.rank_map(train.layout_of(context)).places
        write_trace(context.run.path / "trace.json", dict(zip(places, everyone, strict=True)))
