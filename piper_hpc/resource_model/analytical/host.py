"""How many kernels a layer launches; each costs `launch_s` of the device beyond its work.

Counted from the module lists of Megatron-LM with Transformer Engine, forward and backward. Grouped products are one
launch an expert there, STREAMS of them side by side. The price, `launch_s` of a device, is the gap that a kernel
leaves behind: launch, ramp up and down, and the host's own work where the device waits for it.
"""

from __future__ import annotations

import numpy as np

from piper_hpc.resource_model.analytical.device import STREAMS, Times
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.spec import Execution

GQA_KERNELS = (10, 17)
"""Norm, query-key-value product, split, two rotations, attention and its preparation, output product, residual."""

MLA_KERNELS = (18, 31)
"""As above with five projections, two inner norms, and the parts of the heads split and joined."""

DENSE_KERNELS = (5, 9)
"""Norm, two products, activation, residual."""

STORED_SCORE_KERNELS = (4, 6)
"""Two products, softmax and dropout where flash attention has one kernel."""

MOE_KERNELS = (40, 36)
"""Norm, gate, scores, top-k, statistics, map; permutation, counts and their copy to the host, both exchanges, sort by
expert and back, weighting, sum, residual."""

SHARED_KERNELS = (4, 8)
TENSOR_KERNELS = (2, 3)
"""Exchanges of one block of column and row parallel products."""


def launches(shapes: Shapes, execution: Execution, *, moe: bool) -> Times:
    """Number of kernels that one layer launches, in forward and in backward: times `launch_s` they are seconds."""
    model = shapes.model
    attention = np.array(GQA_KERNELS if model.attention == "gqa" else MLA_KERNELS, dtype=float)
    if not execution.flash:
        attention += STORED_SCORE_KERNELS
    rest = np.array(MOE_KERNELS if moe else DENSE_KERNELS, dtype=float)
    if moe and model.dense_width:
        rest += SHARED_KERNELS
    forward, backward = attention + rest
    blocks = 2 if not moe or model.dense_width else 1
    split = np.where(np.asarray(shapes.layout.tp) > 1, blocks, 0)
    experts = moe * shapes.experts_per_rank * 2 / STREAMS
    return Times(forward + split * TENSOR_KERNELS[0] + experts, backward + split * TENSOR_KERNELS[1] + 2 * experts)
