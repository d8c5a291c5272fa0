"""Peak bytes of every rank of this project's executor, by kind and pipeline stage (the corrected form of Eq 4).

Eq 1-5 of arXiv 2605.05049 as printed are in `resource_model.paper`.
"""

from __future__ import annotations

from piper_hpc.resource_model.schedule import in_flight
from piper_hpc.spec import Layout, ModelSpec, Workload


def stage_parameters(model: ModelSpec, layout: Layout) -> list[int]:
    """Parameters that one rank holds, by stage: its layers with E/EP experts, embedding first, norm and head last."""
    return [dense + expert for dense, expert in stage_parameter_parts(model, layout)]


def stage_parameter_parts(model: ModelSpec, layout: Layout) -> list[tuple[int, int]]:
    """(replicated over the whole stage, replicated over DP alone) parameters of one rank, by stage."""
    dense_layer = model.attention_parameters + model.router_parameters + model.norm_parameters
    experts = model.experts // layout.ep * model.expert_parameters
    parts = []
    for stage, layers in enumerate(layout.layers_by_stage(model.layers)):
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
        zip(layout.layers_by_stage(model.layers), stage_parameters(model, layout), strict=True)
    ):
        first, last = stage == 0, stage == layout.pp - 1
        alive = int(in_flight(layout.schedule, stage, layout.pp, 1, micro_batches))
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
