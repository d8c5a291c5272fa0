"""Assembles a `Prediction` from the terms of a step, for both engines; 90 % intervals symmetric as a ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from piper_hpc.resource_model.flops import FLOP_CONVENTION, flops_per_token
from piper_hpc.spec import TERMS, Layout, ModelSpec, Prediction, Workload
from piper_hpc.spec.prediction import MOST_RANKS_LISTED

Interval = tuple[float, float]


def assemble(
    model: ModelSpec,
    layout: Layout,
    workload: Workload,
    *,
    terms: Mapping[str, float],
    mfu: float,
    memory: dict[str, list[int]],
    bubble_fraction: float | None,
    intervals: dict[str, Interval],
    calibration: dict[str, Any],
    hidden: dict[str, float] | None = None,
    notes: Sequence[str] = (),
    exchange: dict[str, Any] | None = None,
) -> Prediction:
    """The prediction of a step whose exposed seconds are `terms`, which add up to the step.

    memory: kind -> bytes by stage; mfu: 0...1; intervals: 90 %, by term and for `step_time_s`, `tokens_per_s`, `mfu`.
    """
    step_time_s = sum(terms.values())
    return Prediction(
        layout=layout,
        step_time_s=step_time_s,
        tokens_per_s=workload.tokens / step_time_s,
        mfu=mfu,
        peak_memory_bytes=peak_by_rank(memory, layout),
        bubble_fraction=bubble_fraction,
        terms={term: terms[term] for term in TERMS},
        hidden=hidden or {},
        intervals=intervals,
        memory=memory,
        model=model_summary(model, workload.sequence),
        calibration=calibration,
        notes=list(notes),
        exchange=exchange or {},
    )


def peak_by_rank(memory: Mapping[str, Sequence[int]], layout: Layout) -> list[int]:
    """Peak bytes of every rank, or of every stage above MOST_RANKS_LISTED ranks; the ranks of a stage are alike."""
    by_stage = [sum(kinds) for kinds in zip(*memory.values(), strict=True)]
    alike = layout.ranks // layout.pp if layout.ranks <= MOST_RANKS_LISTED else 1
    return [size for size in by_stage for _ in range(alike)]


def model_summary(model: ModelSpec, sequence: int) -> dict[str, Any]:
    """`Prediction.model`: the model's size as its paper counts it, and FLOPs a token in sequences of `sequence`."""
    return {
        "name": model.name,
        "parameters": model.reported_parameters,
        "active_parameters": model.reported_active_parameters,
        "flops_per_token": flops_per_token(model, sequence),
        "flop_convention": FLOP_CONVENTION,
    }


def ratio_interval(seconds: float, half_width: float) -> Interval:
    """(seconds / r, seconds * r) with r = 1 + half_width / seconds: times vary by factors and are never negative."""
    ratio = 1 + half_width / seconds if seconds else 1.0
    return seconds / ratio, seconds * ratio
