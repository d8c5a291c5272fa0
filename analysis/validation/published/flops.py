"""FLOPs per token in the convention of a row, and the peak rate that its MFU is a share of."""

from __future__ import annotations

import math
import re
from functools import cache

import yaml

from analysis.validation.published.frameworks import LAST_YEAR_BEFORE_FLASH
from analysis.validation.published.metrics import FLOPS_GPU, FLOPS_TOTAL, MFU, STEP_TIME, TOKENS, TOKENS_GPU
from analysis.validation.published.request import Refused, Request
from analysis.validation.published.rows import PublishedRow, PublishedRun
from piper_hpc.paths import data_folder
from piper_hpc.resource_model.flops import CONVENTIONS, TRAINING_OVER_FORWARD, ModuleFlops, forward_flops
from piper_hpc.spec import ModelSpec

CAUSAL, NONCAUSAL, HARDWARE = "causal_without_mtp", "noncausal_without_mtp", "hardware"
CONVENTION_TOLERANCE = 0.06
"""A convention is accepted whose FLOPs per token are this near, as |ln(ratio)|, to those that the run implies."""


def flops_per_token(request: Request, convention: str) -> float:
    """Training FLOPs per token in a convention of `resource_model.flops.CONVENTIONS`, or `hardware`.

    `hardware` is without a causal mask, and adds the forward that is computed again: of layers for recompute `full`, of
    scores where attention is recomputed (arXiv 2104.04473 Eq 3, 2205.05198 Eq 7 and 8).
    """
    forward = _forward(request.model, request.sequence, NONCAUSAL if convention == HARDWARE else convention)
    again = 0.0
    if convention == HARDWARE:
        recomputed = request.layout.recomputed
        again = forward.total - forward.head if recomputed.full else forward.scores * recomputed.attention
    return TRAINING_OVER_FORWARD * forward.total + again


def layer_flops(request: Request) -> float:
    """Training FLOPs per token of the layers alone, without a mask."""
    forward = _forward(request.model, request.sequence, NONCAUSAL)
    return TRAINING_OVER_FORWARD * (forward.total - forward.head)


@cache
def _forward(model: ModelSpec, sequence: int, convention: str) -> ModuleFlops:
    """One token's forward FLOPs; the fillings of a run share them."""
    return forward_flops(model, sequence, CONVENTIONS[convention])


def convention(run: PublishedRun, row: PublishedRow, request: Request) -> str:
    """How a row counts FLOPs: by its metric's name, by what its run implies, by its notes, else by its source.

    A run that states both a rate of tokens (or a step time) and of FLOPs implies their quotient: the convention that is
    nearest to it, if one is within 6 %. Megatron, and what is built on it, counts without a mask; Megatron-Bridge,
    NeMo and torchtitan with one. Hardware FLOPs are those that the notes call so.
    """
    if row.quantity.convention:
        return {"causal": CAUSAL, "noncausal": NONCAUSAL}.get(row.quantity.convention, HARDWARE)
    notes = run.cells["notes"].lower()
    if re.search(r"hardware flop|counts recompute", notes):
        return HARDWARE
    if implied := _implied(run, request):
        recent = (run.year or LAST_YEAR_BEFORE_FLASH + 1) > LAST_YEAR_BEFORE_FLASH
        ways = (CAUSAL, NONCAUSAL, "causal", "noncausal", "causal_unwindowed") if recent else (NONCAUSAL, HARDWARE)
        off = {way: abs(math.log(flops_per_token(request, way) / implied)) for way in ways}
        best = min(off, key=lambda way: off[way])
        if off[best] < CONVENTION_TOLERANCE:
            return best
    if re.search(r"non-?causal", notes):
        return NONCAUSAL
    known = re.search(r"megatron-?bridge|nemo|torchtitan", run.cells["source"].lower())
    return CAUSAL if "causal" in notes or known else NONCAUSAL


def _implied(run: PublishedRun, request: Request) -> float | None:
    """FLOPs per token that a run states by printing two rates, None where it does not."""
    stated = {row.quantity.name: row.value for row in run.rows if row.value and not row.quantity.convention}
    batch_known = run.degree("global_batch")
    tokens = stated.get(TOKENS) or (stated.get(TOKENS_GPU) or 0.0) * request.gpus
    if not tokens and STEP_TIME in stated and batch_known:
        tokens = request.global_batch * request.sequence / (stated[STEP_TIME] or math.inf)
    flops = stated.get(FLOPS_TOTAL) or (stated.get(FLOPS_GPU) or 0.0) * request.gpus
    if not flops and MFU in stated:
        flops = (stated[MFU] or 0.0) * peak_flops(run, request) * request.gpus
    return flops / tokens if flops and tokens else None


def noted_peak(run: PublishedRun) -> float | None:
    """The peak that the notes name, FLOP/s."""
    found = re.search(r"peak (?:of )?([\d.]+\d)|([\d.]+\d) ?TFLOP/?s peak", run.cells["notes"], re.I)
    return float(found.group(1) or found.group(2)) * 1e12 if found else None


def peak_flops(run: PublishedRun, request: Request) -> float:
    """The peak that the row names (`peak 989.5`, `191.5 TFLOP/s peak`), else the accelerator's in bf16, FP8 or not.

    Raises Refused where neither is known.
    """
    peak = noted_peak(run) or bf16_peak(request.accelerator)
    if not peak:
        raise Refused(f"gpu={run.cells['gpu']}: its peak is not public, so that the notes must name one, as peak 312")
    return peak


@cache
def bf16_peak(accelerator: str) -> float | None:
    """The dense bf16 peak of a file of `conf/accelerator/`, FLOP/s; None where none is public."""
    document = yaml.safe_load((data_folder("conf") / "accelerator" / f"{accelerator}.yaml").read_text())
    peak = document["peak_flops"]["bfloat16"]
    return float(peak) if peak else None
