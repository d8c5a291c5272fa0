"""Seconds of communication for one micro-batch: tensor and context parallel, dispatch and combine, messages.

Each function says what of it runs beside compute: only the rest is charged to the step, the hidden part is kept too.
"""

from __future__ import annotations

import numpy as np

from piper_hpc.resource_model import collectives
from piper_hpc.resource_model.all_to_all import all_to_all
from piper_hpc.resource_model.analytical.device import Device, Times
from piper_hpc.resource_model.analytical.network import Network, widest_tier
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Execution


def beside(communication_s: Number, compute_s: Number) -> Number:
    """Seconds of communication that are exposed where it overlaps independent compute, as the arguments' shapes."""
    return np.maximum(0.0, communication_s - compute_s)


def tensor(shapes: Shapes, network: Network, execution: Execution, block: Times) -> Times:
    """A column-parallel and a row-parallel product (Megatron-LM, arXiv 1909.08053 and 2205.05198 section 4.2.2).

    With sequence parallelism: gather before, scatter after, both ways; the backward gathers the input once more
    beside its product with the weights' transpose. Without: one all-reduce each way. The backward's last collective
    runs beside the weight gradient, for which `block` gives the time.
    """
    values = shapes.tokens * shapes.model.hidden * shapes.value_bytes
    group = network.groups.tensor
    if execution.sequence_parallel:
        gather = collectives.all_gather_s(group, network.links, values)
        scatter = collectives.reduce_scatter_s(group, network.links, values)
        return Times(gather + scatter, gather + beside(scatter + gather, block.weight / 2))
    reduce = collectives.all_reduce_s(group, network.links, values)
    return Times(reduce, beside(reduce, block.weight / 2))


def context(shapes: Shapes, network: Network, core: Times) -> Times:
    """Ring attention: keys and values go round the cp ranks beside the scores; gradients go with them back."""
    model, cp = shapes.model, shapes.layout.cp
    if model.attention == "gqa":
        width = 2 * shapes.kv_heads * model.head_dim
    else:
        width = (model.q_dim + model.v_dim) / shapes.layout.tp
    share = shapes.tokens * width * shapes.value_bytes
    ring = (cp - 1) * network.send_s(widest_tier(network.groups.context), share)
    return Times(beside(ring, core.forward), beside(2 * ring, core.input))


def experts(device: Device, shapes: Shapes, network: Network, algorithm: str) -> Number:
    """One dispatch or one combine: all-to-all over ep, and over etp the rows gathered or scattered."""
    model = shapes.model
    row_bytes = model.hidden * shapes.value_bytes
    dispatched = all_to_all(
        algorithm,
        network.groups.experts,
        network.links,
        shapes.sent_rows,
        row_bytes,
        shapes.all_to_all_routing,
        copy_s_per_byte=float(device.stream_s(2.0)),
    )
    gathered = collectives.all_gather_s(network.groups.expert_tensor, network.links, shapes.hot_rows * row_bytes)
    return dispatched.seconds + gathered


def whole_tokens(shapes: Shapes, network: Network, execution: Execution) -> Times:
    """Every tensor-parallel rank routes its share of the tokens; without sequence parallelism all need the result."""
    if execution.sequence_parallel:
        return Times()
    values = shapes.tokens * shapes.model.hidden * shapes.value_bytes
    gather = collectives.all_gather_s(network.groups.tensor, network.links, values)
    return Times(gather, gather)


def message_bytes(shapes: Shapes) -> Number:
    """One activation or gradient between stages: every tensor-parallel rank sends its share."""
    return shapes.tokens / shapes.layout.tp * shapes.model.hidden * shapes.value_bytes


def message_s(shapes: Shapes, network: Network, execution: Execution) -> Number:
    """Seconds of one message; without sequence parallelism the receivers gather its shares (arXiv 2104.04473, 4.1)."""
    sent = message_bytes(shapes)
    seconds = network.send_s(network.boundary_tier, sent)
    if execution.sequence_parallel:
        return seconds
    return seconds + collectives.all_gather_s(network.groups.tensor, network.links, sent * shapes.layout.tp)
