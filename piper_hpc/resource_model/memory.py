"""Bytes of every rank: Eq 1-5 of arXiv 2605.05049 as printed, and what this project's executor really keeps.

The `paper_*` functions are the paper's, inconsistencies included (their `batch` is global in the expert terms and per
rank in the attention terms); they exist to be compared with it. Predictions use `memory_by_stage`.
"""

from __future__ import annotations

import math
from fractions import Fraction

from piper_hpc.resource_model.schedule import in_flight
from piper_hpc.spec import Layout, ModelSpec, Workload

STATE_BYTES = 16
"""beta_p: 2 fp16 weight + 2 fp16 gradient + 4 fp32 master + 8 fp32 moments."""


def paper_attention_activation_bytes(model: ModelSpec, batch: Fraction | int, sequence: int, flash: bool) -> Fraction:
    """Table III: 12 b s d + 4 b H s^2, or 12 b s d + 2 b H s with flash attention."""
    scores = 2 * model.heads * sequence if flash else 4 * model.heads * sequence * sequence
    return Fraction(batch) * (12 * sequence * model.hidden + scores)


def paper_expert_activation_bytes(model: ModelSpec, batch: Fraction | int, sequence: int) -> Fraction:
    """Table III: 2 b s k (n_mat f + d), printed with n_mat = 3."""
    per_copy = model.matrices_per_expert * model.expert_ffn + model.hidden
    return Fraction(batch) * 2 * sequence * model.top_k * per_copy


def paper_layer_state_bytes(model: ModelSpec, ep: int) -> Fraction:
    """Table III: 64 d^2 + 48 (E/EP) d f of one layer (48 = 16 n_mat for n_mat = 3)."""
    attention = STATE_BYTES * 4 * model.hidden**2
    return attention + Fraction(STATE_BYTES * model.experts * model.expert_parameters, ep)


def paper_unpartitioned_bytes(model: ModelSpec, batch: int, sequence: int, *, flash: bool = False) -> int:
    """Eq 1: everything on one device."""
    return paper_expert_parallel_bytes(model, batch, sequence, ep=1, flash=flash)


def paper_expert_parallel_bytes(model: ModelSpec, batch: int, sequence: int, *, ep: int, flash: bool = False) -> int:
    """Eq 2: experts and their activations divided by EP, attention replicated."""
    return paper_gpipe_bytes(model, batch, sequence, pp=1, ep=ep, flash=flash)


def paper_gpipe_bytes(model: ModelSpec, batch: int, sequence: int, *, pp: int, ep: int, flash: bool = False) -> int:
    """Eq 3: L/PP layers, all micro-batches alive."""
    layer = paper_layer_state_bytes(model, ep) + _paper_layer_activation(model, Fraction(batch), sequence, ep, flash)
    return math.ceil(Fraction(model.layers, pp) * layer)


def paper_1f1b_bytes(
    model: ModelSpec,
    batch: int,
    sequence: int,
    *,
    pp: int,
    ep: int,
    micro_batches: int,
    stage: int,
    flash: bool = False,
) -> int:
    """Eq 4: as Eq 3 with PP - i micro-batches of b/M sequences alive on stage i."""
    activation = _paper_layer_activation(model, Fraction(batch, micro_batches), sequence, ep, flash)
    layer = paper_layer_state_bytes(model, ep) + (pp - stage) * activation
    return math.ceil(Fraction(model.layers, pp) * layer)


def paper_1f1b_imbalance_bytes(
    model: ModelSpec, batch: int, sequence: int, *, pp: int, ep: int, micro_batches: int, flash: bool = False
) -> int:
    """Eq 5: what stage 0 holds more than the last stage, (L (PP-1)/PP) of one micro-batch's activations."""
    activation = _paper_layer_activation(model, Fraction(batch, micro_batches), sequence, ep, flash)
    return math.ceil(Fraction(model.layers * (pp - 1), pp) * activation)


def paper_checkpointed_bytes(model: ModelSpec, micro_batch: int, sequence: int, *, pp: int, ep: int) -> int:
    """The form behind Fig 10: state, and two saved boundaries a layer of PP micro-batches, ceil(L/PP) layers."""
    layers = math.ceil(model.layers / pp)
    boundaries = pp * 2 * micro_batch * sequence * model.hidden * 2
    return math.ceil(layers * (paper_layer_state_bytes(model, ep) + boundaries))


def xmoe_layer_activation_bytes(model: ModelSpec, micro_batch: int, sequence: int) -> int:
    """Activations of one MoE layer by X-MoE (arXiv 2508.13337): (2 k s d + 2 k s f) x 2 B."""
    return micro_batch * sequence * model.top_k * 2 * (model.hidden + model.expert_ffn) * 2


def _paper_layer_activation(model: ModelSpec, batch: Fraction, sequence: int, ep: int, flash: bool) -> Fraction:
    attention = paper_attention_activation_bytes(model, batch, sequence, flash)
    return attention + paper_expert_activation_bytes(model, batch, sequence) / ep


def stage_parameters(model: ModelSpec, layout: Layout) -> list[int]:
    """Parameters that one rank holds, by stage: its layers with E/EP experts, embedding first, norm and head last."""
    return [dense + expert for dense, expert in stage_parameter_parts(model, layout)]


def stage_parameter_parts(model: ModelSpec, layout: Layout) -> list[tuple[int, int]]:
    """(replicated over the whole stage, replicated over DP alone) parameters of one rank, by stage."""
    dense_layer = model.attention_parameters + model.router_parameters + model.norm_parameters
    experts = model.experts // layout.ep * model.expert_parameters
    parts = []
    for stage, layers in enumerate(layout.stage_layers(model.layers)):
        dense = len(layers) * dense_layer
        dense += model.embedding_parameters if stage == 0 else 0
        dense += model.embedding_parameters + model.hidden if stage == layout.pp - 1 else 0
        parts.append((dense, len(layers) * experts))
    return parts


MOMENT_VALUES = 2
"""AdamW keeps a mean and a variance for every parameter, in the parameter's dtype."""

INDEX_BYTES = 8
"""torch's indices are int64."""


def layer_activation_bytes(model: ModelSpec, tokens: int, ep: int, value_bytes: int, load: float = 1.0) -> int:
    """Bytes that autograd keeps of one layer, its input included, for `tokens` of one rank.

    load: rows that arrive at this rank's experts over the mean, tokens * top_k; those it sent come back to it.

    Counted from the modules as torch runs them one by one: a norm keeps its input, the normalised and the scaled
    rows; attention its heads, their output before and after it is laid out by token, and the softmax's sums; the
    router its probabilities and choices; the experts their rows, each product and the activation; combine the copies
    it weighs; and every permutation its indices.
    """
    rows = tokens * model.top_k
    norm = 3 * model.hidden + 1
    attention = norm + 3 * model.q_dim + 2 * model.kv_dim + model.heads
    router = norm + model.experts + 1 + 2 * model.top_k
    products = 4 if model.matrices_per_expert == 3 else 2
    values = tokens * (attention + router) + rows * model.hidden
    values += round(load * rows) * (model.hidden + products * model.expert_ffn)
    indices = tokens * model.top_k + 2 * rows + (2 * round(load * rows) if ep > 1 else 0)
    return values * value_bytes + indices * INDEX_BYTES


def head_activation_bytes(model: ModelSpec, tokens: int, value_bytes: int) -> int:
    """Bytes kept by the final norm, the output projection and the loss."""
    return tokens * (3 * model.hidden + 1 + model.vocab) * value_bytes


def backward_workspace_bytes(
    model: ModelSpec, tokens: int, ep: int, value_bytes: int, *, last: bool, load: float = 1.0
) -> int:
    """Bytes that the backward of one micro-batch needs for a while, beyond what the forward kept.

    Either in the loss (the gradients of the probabilities and of the logits at once), or in the experts of the last
    layer: gradients of their inner rows beside one weight gradient not yet added up. What was freed by then is less.
    """
    inner = round(load * tokens * model.top_k) * model.expert_ffn
    weight = model.experts // ep * model.hidden * model.expert_ffn
    values = max(inner + weight, (2 if model.matrices_per_expert == 3 else 1) * inner)
    if last:
        freed = head_activation_bytes(model, tokens, value_bytes) // value_bytes
        values = max(2 * tokens * model.vocab, values + tokens * model.hidden - freed)
    return values * value_bytes


def memory_by_stage(model: ModelSpec, layout: Layout, workload: Workload) -> dict[str, list[int]]:
    """Peak bytes of one rank by kind, each a list by stage; a stage's peak is the sum over kinds.

    The per-rank form of Eq 4: PP - i micro-batches of `micro_batch` sequences are alive on stage i, and neither
    attention nor expert activations are divided by EP, because each expert rank brings its own sequences. The peak is
    at the start of a backward, when most is alive.
    """
    value = workload.bytes_per_value
    tokens = layout.micro_batch * workload.sequence
    micro_batches = layout.micro_batches(workload.global_batch)
    message = tokens * model.hidden * value
    logits = tokens * model.vocab * value
    load = float(workload.routing.load(layout.ep))
    layer = layer_activation_bytes(model, tokens, layout.ep, value, load)
    rotary = workload.sequence * model.head_dim * value
    batch = micro_batches * layout.micro_batch * (workload.sequence + 1) * INDEX_BYTES
    stages = []
    for stage, (layers, parameters) in enumerate(
        zip(layout.stage_layers(model.layers), stage_parameters(model, layout), strict=True)
    ):
        first, last = stage == 0, stage == layout.pp - 1
        alive = int(in_flight("1f1b", stage, layout.pp, 1, micro_batches))
        head = head_activation_bytes(model, tokens, value) if last else 0
        # A pipeline keeps what a stage returned until its backward; what it received lies in the message buffers.
        returned = 0 if layout.pp == 1 else logits if last else message
        received = 0 if first else message
        stages.append(
            {
                "parameters": parameters * value,
                "gradients": parameters * value,
                "optimizer": MOMENT_VALUES * parameters * value,
                "activations": alive * (len(layers) * layer + head + returned - received),
                "workspace": backward_workspace_bytes(model, tokens, layout.ep, value, last=last, load=load),
                # torch's stages hold a buffer for every micro-batch and neighbour, and a message on its way to each.
                "messages": (micro_batches + 1) * message * ((not first) + (not last)),
                "buffers": len(layers) * rotary + batch,
            }
        )
    return {kind: [bytes_[kind] for bytes_ in stages] for kind in stages[0]}


def peak_bytes(model: ModelSpec, layout: Layout, workload: Workload) -> list[int]:
    """Peak bytes of one rank, by stage."""
    return [sum(kinds) for kinds in zip(*memory_by_stage(model, layout, workload).values(), strict=True)]
