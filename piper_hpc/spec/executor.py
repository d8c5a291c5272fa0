"""Layouts and models that this project's executor can train: read by checks, planner, resource model and docs.

The resource model plans with more. Whatever is not named here is refused before a job starts, and a plan that needs it
is not offered for training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from piper_hpc.spec.layout import Layout
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.problem import Problem
from piper_hpc.spec.recompute import Recompute
from piper_hpc.spec.schedules import SCHEDULES, SPLIT_BACKWARD

LAYOUT_AXES: Mapping[str, tuple[Any, ...]] = {
    "etp": (1,),
    "tp": (1,),
    "cp": (1,),
    "zero": (0, 1),
    "schedule": ("1f1b", *(name for name in SCHEDULES if name != "1f1b")),
    "recompute": ("none", "selective", "attention", "activation", "attention+activation", "full"),
    "placement": ("linear", "pack"),
}
"""Values that train, the default first; parts of `recompute` in any order. Axes that are not here (pp, vpp, ep, dp,
micro_batch, ...) train with any."""

MODEL_LACKS: Mapping[str, tuple[Any, str]] = {
    "mtp_layers": (0, "multi-token prediction"),
    "positions": (0, "learned position embeddings"),
    "encoder_parameters": (0, "a vision encoder"),
    "router_score": ("softmax", "SparseMixer's routing"),
    "norms_per_layer": (2, "norms behind attention and feed-forward"),
}
"""Facts of a ModelSpec whose other values the torch modules lack: the value to set in their place, and what is lacking.
A plan prices them all."""

LATENT_LACKS = ("attention_sinks", "clip_qkv", "temperature_floor")
"""Facts of attention that the module of latent attention does not have."""

GROUPED_GEMM_ROW_BYTES = 16
"""torch.nn.functional.grouped_mm reads rows of whole 16-byte words; float64 takes a plain loop instead."""

SENDS_UNDER_WAY = 4
"""Messages to pipeline neighbours that one rank keeps for their receiver; with one more it waits for the oldest."""


@dataclass(frozen=True)
class Support:
    """One axis of a layout, for a table: what a plan may choose, and what of it trains."""

    axis: str
    trains: tuple[Any, ...] | None


def trains_with(axis: str, value: Any) -> bool:
    """Whether the executor has this value of a layout's axis; of `recompute` any that Recompute.parse reads."""
    values = LAYOUT_AXES.get(axis)
    if values is None or value in values:
        return True
    return axis == "recompute" and Recompute.parse(value) in map(Recompute.parse, values)


def missing_of_layout(layout: Layout, model: ModelSpec | None = None) -> Iterator[Problem]:
    """What a layout asks for that does not train, with the value that does; of `model`, where one is given."""
    for axis, values in LAYOUT_AXES.items():
        value = getattr(layout, axis)
        if not trains_with(axis, value):
            listed = ", ".join(map(str, values))
            rule = f"must be {listed} to train: task=plan models other values, the executor lacks them"
            yield Problem(f"parallelism.{axis}", value, rule, f"parallelism.{axis}={values[0]}")
    if layout.recomputed.full and layout.schedule in SPLIT_BACKWARD:
        rule = f"schedule {layout.schedule} splits the backward, and each half would compute whole layers again"
        yield Problem("parallelism.recompute", layout.recompute, rule, "parallelism.recompute=selective")
    if model is not None and model.tied_embeddings and layout.stages > 1:
        rule = "one matrix is embedding and head, and the executor keeps it in one stage"
        yield Problem("model.tied_embeddings", True, rule, "parallelism.pp=1 parallelism.vpp=1, or false")


def missing_of_model(model: ModelSpec, dtype: str) -> Iterator[Problem]:
    """What a model has that the torch modules lack. dtype: of the training, float32, bfloat16 or float64."""
    if not model.experts:
        rule = "only task=plan models a model without experts; one that is trained has layers with experts"
        works = f"model.experts=8 model.top_k=2 model.expert_ffn={model.dense_ffn} model.dense_ffn=0"
        yield Problem("model.experts", 0, rule, works)
    for fact, (works, what) in MODEL_LACKS.items():
        if lacks(model, fact):
            rule = f"only task=plan models it: the executor lacks {what}"
            yield Problem(f"model.{fact}", getattr(model, fact), rule, f"model.{fact}={works}")
    for fact in LATENT_LACKS if model.attention == "mla" else ():
        if value := getattr(model, fact):
            rule = "only task=plan models it beside model.attention=mla: the executor lacks it there"
            yield Problem(f"model.{fact}", value, rule, f"model.{fact}={str(type(value)(0)).lower()}")
    if model.rope_scaling is not None and model.rope_scaling.kind == "longrope":
        rule = "only task=plan models it: the executor has yarn, llama3 and linear"
        yield Problem("model.rope_scaling", model.rope_scaling.kind, rule, "model.rope_scaling=null")
    if model.weighted_input and model.top_k > 1:
        rule = "an expert's input is scaled by its weight: the executor sends a token once, so that it has one expert"
        yield Problem("model.top_k", model.top_k, rule, "model.top_k=1, or model.weighted_input=false")
    if model.rope_dim != int(model.rope_fraction * (model.qk_rope_dim or model.head_dim)):
        key = "qk_rope_dim" if model.qk_rope_dim else "head_dim"
        works = f"model.{key}={getattr(model, key) + 1}"
        yield Problem(f"model.{key}", getattr(model, key), "what RoPE turns of a head must be even", works)
    yield from grouped_gemm_rows(model, dtype)


def lacks(model: ModelSpec, fact: str) -> bool:
    """Whether the executor lacks what this fact of MODEL_LACKS says of the model."""
    value = getattr(model, fact)
    if fact == "norms_per_layer":
        return value != (3 if model.dense_residual_ffn else 2)
    return value == "sparsemixer" if fact == "router_score" else bool(value)


def grouped_gemm_rows(model: ModelSpec, dtype: str) -> Iterator[Problem]:
    """Widths that the grouped GEMM cannot read: rows must be multiples of GROUPED_GEMM_ROW_BYTES."""
    multiple = {"float32": GROUPED_GEMM_ROW_BYTES // 4, "bfloat16": GROUPED_GEMM_ROW_BYTES // 2, "float64": 1}[dtype]
    for key in ("hidden", "expert_ffn"):
        value = getattr(model, key)
        if value % multiple:
            rule = (
                f"must be a multiple of {multiple} for {dtype} ({GROUPED_GEMM_ROW_BYTES}-byte rows of the grouped GEMM)"
            )
            yield Problem(f"model.{key}", value, rule, f"model.{key}={-(-value // multiple) * multiple}")


def trains(layout: Layout) -> bool:
    """Whether the executor has everything that a layout asks for."""
    return next(missing_of_layout(layout), None) is None


def support() -> tuple[Support, ...]:
    """Every axis of a layout with the values that train, None where all do."""
    return tuple(Support(axis.name, LAYOUT_AXES.get(axis.name)) for axis in fields(Layout))
