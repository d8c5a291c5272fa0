"""A prediction: step time by term, memory, MFU, in the units and names that the record of a run uses too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from piper_hpc.spec.layout import Layout

SCHEMA_VERSION = 1

TERMS = (
    "attention_s",
    "router_s",
    "expert_s",
    "dispatch_s",
    "combine_s",
    "weight_grad_s",
    "head_s",
    "p2p_s",
    "bubble_s",
    "grad_reduce_s",
    "optimizer_s",
    "host_s",
    "other_s",
)
"""Exposed seconds of one step on the critical stage; they add up to `step_time_s`.

attention: norm, projections, scores; router: norm, gate, auxiliary loss; dispatch and combine: permutation and
exchange; weight_grad: gradients of weights, where the schedule computes them apart from those of inputs (else 0: they
are in the terms of their modules); head: embedding, final norm, output projection and loss; host: batch preparation
and the launch of work.
"""


MOST_RANKS_LISTED = 1024
"""Ranks whose peak memory is listed one by one; the ranks of a stage are alike, and a list of 16,384 is no help."""


@dataclass(frozen=True)
class Prediction:
    """The contract of `prediction.json`: see the field names; seconds, bytes, tokens per second.

    peak_memory_bytes: of every rank; of every stage where there are more than MOST_RANKS_LISTED ranks.

    routing: the skew that was assumed (load of an expert group's busiest rank over the mean), and in `by_skew` the
    step's time, terms and peak memory at others: what to compare a run with once its routing is known.
    exchange: the all-to-all of each stage (`stages`: algorithm, and why it was chosen), and `payload_bytes`,
    rows that all ranks send in a step over links of each level: inside a node, to another node, to another rack; and
    where an algorithm is not flat the constants of the `model` that it was predicted with.
    """

    layout: Layout
    step_time_s: float
    tokens_per_s: float
    mfu: float
    peak_memory_bytes: list[int]
    bubble_fraction: float | None
    terms: dict[str, float]
    hidden: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    memory: dict[str, list[int]]
    model: dict[str, Any]
    calibration: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    routing: dict[str, Any] = field(default_factory=dict)
    exchange: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)
