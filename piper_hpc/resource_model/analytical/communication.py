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


def exposed_s(communication_s: Number, compute_s: Number) -> Number:
    """Exposed seconds of communication that overlaps independent compute: max(0, communication_s - compute_s)."""
    return np.maximum(0.0, communication_s - compute_s)


def tensor_parallel(shapes: Shapes, network: Network, execution: Execution, block: Times) -> Times:
    """A column-parallel and a row-parallel product (Megatron-LM, arXiv 1909.08053 and 2205.05198 section 4.2.2).

    With sequence parallelism: gather before, scatter after, both ways; the backward gathers the input once more
    beside its product with the weights' transpose. Without: one all-reduce each way. The backward's last collective
    runs beside the weight gradient of one of the two products, half of block.weight_grad.
    Each collective has a buffer of [tokens, hidden] values. block: compute seconds of both products.
    """
    values = shapes.tokens * shapes.model.hidden * shapes.value_bytes
    group = network.groups.tensor
    if execution.sequence_parallel:
        gather = collectives.all_gather_s(group, network.links, values)
        scatter = collectives.reduce_scatter_s(group, network.links, values)
        return Times(gather + scatter, gather + exposed_s(scatter + gather, block.weight_grad / 2))
    reduce = collectives.all_reduce_s(group, network.links, values)
    return Times(reduce, exposed_s(reduce, block.weight_grad / 2))


def context_parallel(shapes: Shapes, network: Network, core: Times) -> Times:
    """Ring attention (arXiv 2310.01889): keys and values go round the cp ranks beside the scores, cp - 1 messages.

    In the backward their gradients travel too, twice the bytes. core: compute seconds of core_attention. A message has
    [tokens, 2 * kv_heads * head_dim] values of this rank's share, for MLA [tokens, (q_dim + v_dim) / tp].
    """
    model, cp = shapes.model, shapes.layout.cp
    if model.attention == "gqa":
        width = 2 * shapes.kv_heads * model.head_dim
    else:
        width = (model.q_dim + model.v_dim) / shapes.layout.tp
    share = shapes.tokens * width * shapes.value_bytes
    ring = (cp - 1) * network.send_s(widest_tier(network.groups.context), share)
    return Times(exposed_s(ring, core.forward), exposed_s(2 * ring, core.input_grad))


def expert_all_to_all_s(device: Device, shapes: Shapes, network: Network, algorithm: str) -> Number:
    """Seconds of one dispatch or one combine: all-to-all over ep, and over etp the rows gathered or scattered.

    Rows are [sent_rows, hidden] of the mean rank; see resource_model.all_to_all for the formula of each algorithm.
    """
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
    gathered = collectives.all_gather_s(network.groups.expert_tensor, network.links, shapes.busiest_rows * row_bytes)
    return dispatched.seconds + gathered


def gather_tokens(shapes: Shapes, network: Network, execution: Execution) -> Times:
    """All-gather of [tokens, hidden] over tp after the combine: ranks route a tp-th each, and all need the result.

    Nothing with sequence parallelism, where each keeps its share.
    """
    if execution.sequence_parallel:
        return Times()
    values = shapes.tokens * shapes.model.hidden * shapes.value_bytes
    gather = collectives.all_gather_s(network.groups.tensor, network.links, values)
    return Times(gather, gather)


def message_bytes(shapes: Shapes) -> Number:
    """Bytes of one message between stages, an activation or its gradient: [tokens / tp, hidden] values of each rank."""
    return shapes.tokens / shapes.layout.tp * shapes.model.hidden * shapes.value_bytes


def message_s(shapes: Shapes, network: Network, execution: Execution) -> Number:
    """Seconds of one message; without sequence parallelism the receivers gather its shares (arXiv 2104.04473, 4.1)."""
    sent = message_bytes(shapes)
    seconds = network.send_s(network.boundary_tier, sent)
    if execution.sequence_parallel:
        return seconds
    return seconds + collectives.all_gather_s(network.groups.tensor, network.links, sent * shapes.layout.tp)
