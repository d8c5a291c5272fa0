"""FLOPs per token in the convention of a row, and the peak rate that its MFU is a share of."""

from __future__ import annotations

import math
import re

from analysis.published.habits import LAST_PLAIN_YEAR
from analysis.published.metrics import FLOPS_GPU, FLOPS_TOTAL, MFU, STEP_TIME, TOKENS, TOKENS_GPU
from analysis.published.request import Request
from analysis.published.rows import PublishedRow, PublishedRun
from piper_hpc.spec import ModelSpec

CAUSAL, NONCAUSAL, HARDWARE = "causal", "noncausal", "hardware"
PEAK_FLOPS = {
    "a100_40gb": 312e12, "a100_80gb": 312e12, "h100": 989e12, "h800": 989e12, "h200": 989e12, "gh200": 989e12,
    "b200": 2250e12, "gb200": 2500e12, "mi250x_gcd": 191.5e12, "mi300x": 1307e12, "mi325x": 1307e12, "mi355x": 2500e12,
}  # fmt: skip
"""Dense bf16 rates that publications divide by, where a row does not name its own; also for FP8 runs."""
NEAR = 0.06
"""A run's FLOPs per token decide its convention where one is nearer than this."""


def layer_weights(model: ModelSpec) -> tuple[float, float]:
    """Matrix parameters that a token meets in all layers, and in the head: embeddings, router and norms excluded."""
    matrices = model.matrices_per_expert
    routed = (
        model.top_k * model.expert_weights + matrices * model.hidden * model.shared_experts * model.shared_expert_ffn
    )
    residual = model.dense_matrices * model.hidden * model.dense_residual_ffn
    dense = model.dense_matrices * model.hidden * model.dense_ffn
    layers = (
        model.layers * model.attention_weights + model.moe_layers * (routed + residual) + model.dense_layers * dense
    )
    return float(layers), float(model.hidden * model.vocab)


def score_width(model: ModelSpec, sequence: int) -> float:
    """Tokens that a query meets times (q_dim + v_dim), over all layers, without a causal mask."""
    seen = sum(min(window, sequence) if window else sequence for window in model.windows)
    return float(seen * (model.q_dim + model.v_dim))


def flops_per_token(request: Request, convention: str) -> float:
    """Training FLOPs per token: 6 x matrices + 6 x scores, these halved in `causal`.

    `hardware` counts without a mask and adds the forward that is computed again: of layers for recompute `full`, of
    scores where attention is recomputed (arXiv 2104.04473 Eq 3, 2205.05198 Eq 7 and 8).
    """
    model = request.model
    layers, head = layer_weights(model)
    scores = score_width(model, request.sequence)
    if convention == CAUSAL:
        return 6 * (layers + head) + 3 * scores
    again = 0.0
    if convention == HARDWARE:
        recomputed = request.layout.recomputed
        again = 2 * layers + 2 * scores if recomputed.full else 2 * scores * recomputed.attention
    return 6 * (layers + head) + 6 * scores + again


def layer_flops(request: Request) -> float:
    """Training FLOPs per token of the layers alone, without a mask."""
    layers, _ = layer_weights(request.model)
    return 6 * layers + 6 * score_width(request.model, request.sequence)


def convention(run: PublishedRun, row: PublishedRow, request: Request) -> str:
    """How a row counts FLOPs: by its metric's name, by what its run implies, by its notes, else by its source.

    A run that states both a rate of tokens (or a step time) and of FLOPs implies their quotient: the convention that is
    nearest to it, if one is within 6 %. Megatron, and what is built on it, counts without a mask; Megatron-Bridge,
    NeMo and torchtitan with one. Hardware FLOPs are those that the notes call so.
    """
    if row.quantity.convention:
        return row.quantity.convention
    notes = run.cells["notes"].lower()
    if re.search(r"hardware flop|counts recompute", notes):
        return HARDWARE
    if implied := _implied(run, request):
        ways = (CAUSAL, NONCAUSAL) if (run.year or LAST_PLAIN_YEAR + 1) > LAST_PLAIN_YEAR else (NONCAUSAL, HARDWARE)
        off = {way: abs(math.log(flops_per_token(request, way) / implied)) for way in ways}
        best = min(off, key=lambda way: off[way])
        if off[best] < NEAR:
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


def peak_flops(run: PublishedRun, request: Request) -> float:
    """The peak that the row names (`peak 989.5`, `191.5 TFLOP/s peak`), else the accelerator's in PEAK_FLOPS."""
    notes = run.cells["notes"]
    found = re.search(r"peak (?:of )?([\d.]+\d)|([\d.]+\d) ?TFLOP/?s peak", notes, re.I)
    return float(found.group(1) or found.group(2)) * 1e12 if found else PEAK_FLOPS[request.accelerator]
