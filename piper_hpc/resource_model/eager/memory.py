"""Peak bytes of every rank of this project's executor, by kind and pipeline rank (the corrected form of Eq 4).

Eq 1-5 of arXiv 2605.05049 as printed are in `resource_model.paper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

from piper_hpc.resource_model.eager.compute import loss_bytes
from piper_hpc.resource_model.eager.pipeline import Held, held_chunks, most_alive, run_schedule
from piper_hpc.spec import Layout, ModelSpec, Recompute, Workload
from piper_hpc.spec.schedules import holders

INDEX_BYTES = 8
"""torch's indices are int64."""

NOTHING = Recompute()


def stage_parameters(model: ModelSpec, layout: Layout) -> list[int]:
    """Parameters that one rank holds, by pipeline rank: its layers with E/EP experts, the model's ends."""
    return [
        sum(sum(chunk_parameters(model, layout.ep, chunk)) for chunk in chunks)
        for chunks in held_chunks(layout, model.layers)
    ]


def chunk_parameters(model: ModelSpec, ep: int, chunk: Held) -> tuple[int, int]:
    """(replicated over the whole stage, replicated over DP alone) parameters of one rank's chunk: its layers with E/EP
    experts, the embedding of the first stage, norm and head of the last."""
    layer = model.attention_parameters + model.router_parameters + model.norm_parameters
    ends = chunk.first * model.embedding_parameters + chunk.last * (model.embedding_parameters + model.hidden)
    return chunk.layers * layer + ends, chunk.layers * (model.experts // ep) * model.expert_parameters


def layer_activation_bytes(
    model: ModelSpec, tokens: int, ep: int, value_bytes: int, load: float = 1.0, recompute: Recompute = NOTHING
) -> int:
    """Bytes that autograd keeps of one layer, its input included, for `tokens` of one rank.

    load: rows that arrive at this rank's experts over the mean, tokens * top_k; those it sent come back to it.

    Counted from the modules as torch runs them one by one: a norm keeps its input, the normalised and the scaled
    rows; attention its heads, their output before and after it is laid out by token, and the softmax's sums; the
    router its probabilities and choices; the experts their rows, each product and the activation; combine the copies
    it weighs; and every permutation its indices. Recomputed attention keeps neither its output nor the sums, a
    recomputed activation only the products that it is made of, a recomputed layer its input alone.
    """
    if recompute.full:
        return tokens * model.hidden * value_bytes
    rows = tokens * model.top_k
    norm = 3 * model.hidden + 1
    attention = norm + 3 * model.q_dim + 2 * model.kv_dim + model.heads
    attention -= (model.q_dim + model.heads) if recompute.attention else 0
    router = norm + model.experts + 1 + 2 * model.top_k
    products = (4 if model.matrices_per_expert == 3 else 2) // (2 if recompute.activation else 1)
    values = tokens * (attention + router) + rows * model.hidden
    values += round(load * rows) * (model.hidden + products * model.expert_ffn)
    indices = tokens * model.top_k + 2 * rows + (2 * round(load * rows) if ep > 1 else 0)
    return values * value_bytes + indices * INDEX_BYTES


def head_activation_bytes(model: ModelSpec, tokens: int, value_bytes: int) -> int:
    """Bytes kept by the final norm, the output projection and the loss, whose log-probabilities have loss_bytes."""
    return tokens * ((3 * model.hidden + 1) * value_bytes + model.vocab * loss_bytes(value_bytes))


def backward_workspace_bytes(
    model: ModelSpec,
    tokens: int,
    ep: int,
    value_bytes: int,
    *,
    last: bool,
    load: float = 1.0,
    recompute: Recompute = NOTHING,
) -> int:
    """Bytes that the backward of one micro-batch needs for a while, beyond what the forward kept.

    Either in the loss (the gradients of the probabilities and of the logits at once), or in the experts of the last
    layer: gradients of their inner rows beside one weight gradient not yet added up, and what is computed again. What
    was freed by then is less.
    """
    gated = model.matrices_per_expert == 3
    inner = round(load * tokens * model.top_k) * model.expert_ffn
    weight = model.experts // ep * model.hidden * model.expert_ffn
    experts = max(inner + weight, (2 if gated else 1) * inner) * value_bytes
    if recompute.full:
        whole = layer_activation_bytes(model, tokens, ep, value_bytes, load)
        experts += whole - layer_activation_bytes(model, tokens, ep, value_bytes, load, recompute)
    elif recompute.activation:
        experts += (2 if gated else 1) * inner * value_bytes
    if not last:
        return experts
    freed = head_activation_bytes(model, tokens, value_bytes) - tokens * model.hidden * value_bytes
    return max(2 * tokens * model.vocab * loss_bytes(value_bytes), experts - freed)


def memory_by_rank(
    model: ModelSpec, layout: Layout, workload: Workload, pools: Sequence[int] = ()
) -> dict[str, list[int]]:
    """Peak bytes of one rank by kind, each a list by pipeline rank; a rank's peak is the sum over kinds.

    The per-rank form of Eq 4 for any schedule: as many micro-batches of each chunk as its order keeps alive, and
    neither attention nor expert activations are divided by EP, because each expert rank brings its own sequences. The
    peak is at the start of a backward, when most is alive, or where ZeRO 1 receives the gradients of its shard.
    pools: bytes of the all-to-all's buffers by pipeline rank (pool.pool_bytes), 0 unless given.
    """
    recipe, recompute, value = workload.recipe, layout.recomputed, workload.bytes_per_value
    tokens = layout.micro_batch * workload.sequence
    micro_batches = layout.micro_batches(workload.global_batch)
    message, logits = tokens * model.hidden * value, tokens * model.vocab * value
    load = float(workload.routing.load(layout.ep))
    layer = layer_activation_bytes(model, tokens, layout.ep, value, load, recompute)
    head = head_activation_bytes(model, tokens, value)
    workspaces = {
        last: backward_workspace_bytes(model, tokens, layout.ep, value, last=last, load=load, recompute=recompute)
        for last in (False, True)
    }
    rotary = workload.sequence * model.head_dim * value
    batch = micro_batches * layout.micro_batch * (workload.sequence + 1) * INDEX_BYTES
    on_rank = holders(layout.schedule, layout.pp, layout.vpp)
    neighbours = [0] * layout.pp
    for sender, receiver in pairwise(on_rank):
        for rank in {sender, receiver} if sender != receiver else ():
            neighbours[rank] += 1

    def kept(chunk: Held) -> int:
        # A pipeline keeps what a stage returned until its backward; what it received lies in the message buffers, or
        # was returned by another chunk of the rank.
        returned = 0 if layout.stages == 1 else logits if chunk.last else message
        received = 0 if chunk.first else message
        return chunk.layers * layer + chunk.last * head + returned - received

    ranks = []
    for rank, chunks in enumerate(held_chunks(layout, model.layers)):
        sizes = [chunk_parameters(model, layout.ep, chunk) for chunk in chunks]
        held = sum(map(sum, sizes))
        shares = (ceil(dense / layout.dense_dp) + ceil(experts / layout.dp) for dense, experts in sizes)
        updated = sum(shares) if layout.zero else held
        # Where the weight is the master, ZeRO 1 keeps its shard of it apart.
        master = recipe.master_bytes or (recipe.weight_bytes if layout.zero else 0)
        each = [kept(chunk) for chunk in chunks]
        moments = most_alive(run_schedule(layout), rank, layout.pp, layout.vpp, micro_batches)
        activations = max(sum(n * size for n, size in zip(alive, each, strict=True)) for alive in moments)
        scattered = [(dense, layout.dense_dp) for dense, _ in sizes] + [(experts, layout.dp) for _, experts in sizes]
        shards = layout.zero * max(count * (copies > 1) for count, copies in scattered) * recipe.gradient_bytes
        ranks.append(
            {
                "parameters": held * recipe.weight_bytes,
                "gradients": held * recipe.gradient_bytes,
                "optimizer": updated * (recipe.moment_bytes + master),
                "activations": activations,
                "workspace": max(*(workspaces[chunk.last] for chunk in chunks), shards - activations),
                # torch's stages hold a buffer for every micro-batch and neighbour, and a message on its way to each.
                "messages": (micro_batches + 1) * message * neighbours[rank],
                "exchange": pools[rank] if pools else 0,
                "buffers": sum(chunk.layers for chunk in chunks) * rotary + batch,
            }
        )
    return {kind: [bytes_[kind] for bytes_ in ranks] for kind in ranks[0]}


def peak_bytes(model: ModelSpec, layout: Layout, workload: Workload, pools: Sequence[int] = ()) -> list[int]:
    """Peak bytes of one rank, by pipeline rank."""
    return [sum(kinds) for kinds in zip(*memory_by_rank(model, layout, workload, pools).values(), strict=True)]
