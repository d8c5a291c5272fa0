"""task=profile: train a few steps and write where their time went, rank by rank, as a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from piper_hpc.profiling.spans import Span
from piper_hpc.profiling.trace import write_document, write_trace
from piper_hpc.resource_model.predict import timeline
from piper_hpc.spec import Calibration, RankPlace
from piper_hpc.tasks import train
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.leaving import Left
from piper_hpc.tasks.timeline import aligned
from piper_hpc.train.settings import WARMUP_STEPS


def run(context: Context) -> Left | None:
    """Train `task.profile_steps` steps after the ones that warm up; rank 0 writes `trace.json`
    and, where something was measured or stated of the cluster, `timeline.json`."""
    calibration = train.prepare(context)
    steps = WARMUP_STEPS + context.experiment.task.profile_steps
    kept: list[tuple[int, Sequence[Span]]] = []
    left = train.execute(context, calibration, steps, kept)
    mine = [spans for step, spans in kept if step >= WARMUP_STEPS]
    everyone: list[Any] | None = [None] * context.rank_env.ranks if context.is_first else None
    dist.gather_object(mine, everyone)
    if everyone is None:
        return None
    places = context.rank_map(train.layout_of(context)).places
    write_trace(
        context.run.path / "trace.json",
        {place: [span for spans in steps for span in spans] for place, steps in zip(places, everyone, strict=True)},
    )
    if calibration is not None:
        _write_timeline(context, calibration, places, everyone)
    return left


def _write_timeline(
    context: Context, calibration: Calibration, places: Sequence[RankPlace], steps: Sequence[Sequence[Sequence[Span]]]
) -> None:
    """`timeline.json`: the pipeline as predicted beside that of the profiled step of median length. steps: by rank."""
    experiment, layout = context.experiment, train.layout_of(context)
    cluster = context.granted.spec(experiment.cluster, calibration)
    lengths = [spans[0].end_s - spans[0].start_s for spans in steps[0]]
    typical = sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2]
    document = aligned(
        timeline(experiment.model, cluster, layout, experiment.workload),
        {place: of_rank[typical] for place, of_rank in zip(places, steps, strict=True)},
    )
    write_document(context.run.path / "timeline.json", document)
