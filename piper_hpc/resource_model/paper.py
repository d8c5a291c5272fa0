"""Eq 1-12 of Piper (arXiv 2605.05049) as printed, in the paper's order, and what its figures and tables rest on.

They are the paper's, inconsistencies included: its `batch` is global in the expert terms and per rank in the attention
terms of Eq 1-6, and states are 16 B a parameter whatever the recipe. They exist to be compared with the paper, and
nothing is predicted with them: `eager` and `analytical` have the corrected forms.
"""

from __future__ import annotations

import math
from fractions import Fraction

from piper_hpc.spec import ModelSpec

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


def paper_all_to_all_s(model: ModelSpec, batch: int, sequence: int, ep: int, nic_bytes_per_s: float) -> float:
    """Eq 6 of arXiv 2605.05049: the lower bound of one layer's dispatch and combine, forward, in seconds.

    4 b s k d / (EP B_NIC), 2 B per value; tight only where the NICs are saturated.
    """
    return 4 * batch * sequence * model.top_k * model.hidden / (ep * nic_bytes_per_s)


def paper_migration_bytes(model: ModelSpec, ep: int) -> int:
    """Bytes one rank sends when every expert of a layer moves: 16 n_mat (E/EP) d f (48 for n_mat = 3, Table IV)."""
    return 16 * model.experts // ep * model.expert_parameters


def paper_layout_holds(
    model: ModelSpec, *, pp: int, ep: int, nodes: int, gpus_per_node: int, nodes_per_switch: int
) -> dict[str, bool]:
    """Eq 7-10: the conditions on a layout, by equation.

    Eq 7: PP EP = n g, no replicas (data parallelism is mentioned beside it, and is not in the equation); Eq 8: EP
    divides E; Eq 9: PP <= L; Eq 10: EP <= g N_h, the GPUs below one switch. Eq 11 is of memory: see `paper_fits`.
    """
    return {
        "Eq 7": pp * ep == nodes * gpus_per_node,
        "Eq 8": model.experts % ep == 0,
        "Eq 9": pp <= model.layers,
        "Eq 10": ep <= gpus_per_node * nodes_per_switch,
    }


def paper_fits(peak_bytes: int, memory_bytes: int) -> bool:
    """Eq 11: the peak of stage 0 under 1F1B (`paper_1f1b_bytes`) is at most the memory of a GPU."""
    return peak_bytes <= memory_bytes


def paper_mfu(
    model_flops: float, peak_flops: float, gpus: int, compute_s: float, exchange_s: float, bubble: float
) -> float:
    """Eq 12 of arXiv 2605.05049: F_model / (pi G t_compute) times t_compute / t_step, no credit for overlap.

    model_flops: of the whole step; peak_flops: of one GPU; compute_s: attention and experts; exchange_s: all-to-all
    and p2p; bubble: the idle fraction of the step, so t_step = (t_compute + t_comm) / (1 - bubble).
    """
    step_s = (compute_s + exchange_s) / (1 - bubble)
    return model_flops / (peak_flops * gpus * compute_s) * (compute_s / step_s)
