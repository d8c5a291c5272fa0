"""Peak bytes of every rank of this project's executor, by kind and pipeline rank (the corrected form of Eq 4).

Eq 1-5 of arXiv 2605.05049 as printed are in `resource_model.paper`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from operator import mul

from piper_hpc.resource_model.eager.activations import (
    INDEX_BYTES,
    MOE,
    NOTHING,
    keeps_input,
    layer_activation_bytes,
    norm_bytes,
    split_values,
)
from piper_hpc.resource_model.eager.compute import loss_bytes
from piper_hpc.resource_model.eager.load import busiest_load
from piper_hpc.resource_model.eager.pipeline import Alive, Held, alive_by_rank, held_chunks, neighbours_by_rank
from piper_hpc.spec import LayerKind, Layout, ModelSpec, Recompute, Workload
from piper_hpc.spec.executor import SENDS_UNDER_WAY


@lru_cache(maxsize=4096)
def chunk_parameters(model: ModelSpec, ep: int, chunk: Held) -> tuple[int, int]:
    """(replicated over the whole stage, replicated over DP alone) parameters of one rank's chunk: its layers with E/EP
    experts, the embedding of the first stage, norm and head of the last."""
    ends = chunk.first * model.embedding_parameters
    if chunk.last:
        tied = model.tied_embeddings and chunk.first
        ends += model.norm_width + model.vocab * model.head_bias + (0 if tied else model.embedding_parameters)
    layers = sum(count * model.parameters_of(moe=kind.moe).replicated for kind, count in chunk.kinds)
    return layers + ends, chunk.moe_layers * (model.experts // ep) * model.expert_parameters


def head_activation_bytes(model: ModelSpec, tokens: int, value_bytes: int) -> int:
    """Bytes kept by the final norm, the output projection and the loss, whose log-probabilities have loss_bytes."""
    return tokens * (norm_bytes(model, model.hidden, value_bytes) + model.vocab * loss_bytes(value_bytes))


def split_activation_bytes(model: ModelSpec, tokens: int, value_bytes: int, load: float = 1.0, *, chunk: Held) -> int:
    """Bytes that the backward of a chunk's input (I) leaves for that of its weights (W), less those that it frees.

    The last stage trades the loss's probabilities for the gradients of the logits and of the final norm; any other
    frees the copies that the combine of its last layer weighed, if that has experts.
    """
    products = 2 if model.matrices_per_expert == 3 else 1
    values = sum(count * tokens * split_values(model, kind) for kind, count in chunk.kinds)
    values += chunk.moe_layers * round(load * tokens * model.top_k) * (model.hidden + products * model.expert_ffn)
    if chunk.last:
        values += tokens * (model.hidden + model.vocab)
        return values * value_bytes - tokens * model.vocab * loss_bytes(value_bytes)
    return (values - bool(chunk.moe_layers) * tokens * model.top_k * model.hidden) * value_bytes


def combine_workspace_bytes(model: ModelSpec, tokens: int, ep: int, value_bytes: int, load: float = 1.0) -> int:
    """Bytes that the forward of a layer needs for a while at its end, beyond what it keeps: the experts' rows, what an
    exchange received of them, and the copies after they were weighed."""
    rows = tokens * model.top_k
    return (round(load * rows) + (2 if ep > 1 else 1) * rows) * model.hidden * value_bytes


def backward_workspace_bytes(
    model: ModelSpec,
    tokens: int,
    ep: int,
    value_bytes: int,
    *,
    last: bool,
    load: float = 1.0,
    recompute: Recompute = NOTHING,
    kind: LayerKind = MOE,
) -> int:
    """Bytes that the backward of one micro-batch needs for a while, beyond what the forward kept.

    Either in the loss (the gradients of the probabilities and of the logits at once), or in the feed-forward of the
    last layer, of that kind: gradients of its inner rows beside one weight gradient not yet added up, and what is
    computed again. What was freed by then is less.
    """
    gated = (model.matrices_per_expert if kind.moe else model.dense_matrices) == 3
    width, held = (model.expert_ffn, model.experts // ep) if kind.moe else (model.dense_ffn, 1)
    inner = (round(load * tokens * model.top_k) if kind.moe else tokens) * width
    weight = held * model.hidden * width
    needed = max(inner + weight, (2 if gated else 1) * inner) * value_bytes
    if recompute.full:
        whole = layer_activation_bytes(model, tokens, ep, value_bytes, load, kind=kind)
        again = combine_workspace_bytes(model, tokens, ep, value_bytes, load) * kind.moe
        needed = whole - tokens * model.hidden * value_bytes + max(needed, again + tokens * model.hidden * value_bytes)
    elif recompute.activation:
        needed += (2 if gated else 1) * inner * value_bytes
    if not last:
        return needed
    freed = head_activation_bytes(model, tokens, value_bytes) - tokens * model.hidden * value_bytes
    return max(2 * tokens * model.vocab * loss_bytes(value_bytes), needed - freed)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one pipeline rank, whatever the order of its actions.

    fixed: by kind; kept: of one micro-batch of each chunk from its forward to the end of its backward, then of each
    between the backward of its input and that of its weights; workspace: of a forward or backward for a while; shards:
    that ZeRO 1 receives after the last backward.
    """

    fixed: dict[str, int]
    kept: tuple[int, ...]
    workspace: int
    shards: int

    def kinds(self, alive: Alive) -> dict[str, int]:
        """Bytes by kind at the peak: between two passes, when most is alive, or where shards are received."""
        activations = max(sum(map(mul, moment, self.kept)) for moment in alive)
        return self.fixed | {"activations": activations, "workspace": max(self.workspace, self.shards - activations)}

    def peak_bytes(self, alive: Alive) -> int:
        """The sum of `kinds`."""
        return sum(self.kinds(alive).values())


def rank_memories(model: ModelSpec, layout: Layout, workload: Workload) -> list[RankMemory]:
    """The memory of every pipeline rank; equal for all schedules that place the stages alike."""
    recipe, value = workload.recipe, workload.bytes_per_value
    tokens, micro_batches = layout.micro_batch * workload.sequence, layout.micro_batches(workload.global_batch)
    message, logits = tokens * model.hidden * value, tokens * model.vocab * value
    load = busiest_load(model, layout, workload)
    head = head_activation_bytes(model, tokens, value)

    def layer(kind: LayerKind) -> int:
        return _layer_bytes(model, tokens, layout.ep, value, load, layout.recomputed, kind)

    def workspace(chunk: Held) -> int:
        return max(
            _workspace_bytes(model, tokens, layout.ep, value, load, layout.recomputed, kind, chunk.last)
            for kind, _ in chunk.kinds
        )

    batch = micro_batches * layout.micro_batch * (workload.sequence + 1) * INDEX_BYTES

    def optimizer_bytes(count: int, copies: int) -> int:
        if not layout.zero or copies == 1:
            return count * (recipe.moment_bytes + recipe.master_bytes)
        # A slice of the master lies apart, also where the weight is the master, and so does the sum of its gradient.
        master = recipe.master_bytes or recipe.weight_bytes
        return ceil(count / copies) * (recipe.moment_bytes + master + recipe.gradient_bytes)

    def kept(chunk: Held) -> int:
        # A pipeline keeps what a stage returned until its backward; what it received lies in the message buffers, and
        # so does what passes from one chunk to the next of the same rank.
        returned = 0 if layout.stages == 1 or chunk.turns else logits if chunk.last else message
        same = layout.recomputed.full or keeps_input(model, value)
        received = message if same and not chunk.first else 0
        layers = sum(count * layer(kind) for kind, count in chunk.kinds)
        return layers + chunk.last * head + returned - received

    def left(chunk: Held) -> int:
        # torch does the whole backward of the first stage where that of its weights belongs.
        if chunk.first:
            return 0
        return split_activation_bytes(model, tokens, value, load, chunk=chunk)

    def of_rank(chunks: tuple[Held, ...], neighbours: int) -> RankMemory:
        sizes = [chunk_parameters(model, layout.ep, chunk) for chunk in chunks]
        held, messages = sum(map(sum, sizes)), micro_batches * neighbours
        passed_on = 2 * micro_batches * sum(chunk.turns for chunk in chunks)
        scattered = [(dense, layout.dense_dp) for dense, _ in sizes] + [(experts, layout.dp) for _, experts in sizes]
        fixed = {
            "parameters": held * recipe.weight_bytes,
            "gradients": held * recipe.gradient_bytes,
            "optimizer": sum(optimizer_bytes(count, copies) for count, copies in scattered),
            # torch's stages hold a buffer for every micro-batch and neighbour, and all that passes between two chunks
            # of one rank; what was sent last is on its way.
            "messages": (messages + passed_on + min(messages, SENDS_UNDER_WAY)) * message,
            "buffers": _table_bytes(model, chunks, workload.sequence, value) + batch,
        }
        # Slices of all chunks wait until the step's end for their sum; those of one chunk at a time are on their way.
        travelling = [
            (layout.dense_dp > 1) * dense + (layout.dp > 1) * experts for dense, experts in sizes if layout.zero
        ]
        shards = (sum(travelling) + max(travelling, default=0)) * recipe.gradient_bytes
        return RankMemory(fixed, (*map(kept, chunks), *map(left, chunks)), max(map(workspace, chunks)), shards)

    neighbours_of_rank = neighbours_by_rank(layout.schedule, layout.pp, layout.vpp)
    ranks = list(zip(held_chunks(layout, model), neighbours_of_rank, strict=True))
    known = {rank: of_rank(*rank) for rank in set(ranks)}
    return [known[rank] for rank in ranks]


def memory_by_rank(
    model: ModelSpec, layout: Layout, workload: Workload, pools: Sequence[int] = ()
) -> dict[str, list[int]]:
    """Peak bytes of one rank by kind, each a list by pipeline rank; a rank's peak is the sum over kinds.

    The per-rank form of Eq 4 for any schedule: as many micro-batches of each chunk as its order keeps alive, and
    neither attention nor expert activations are divided by EP, because each expert rank brings its own sequences.
    pools: bytes of the all-to-all's buffers by pipeline rank (pool.pool_bytes), 0 unless given.
    """
    moments = alive_by_rank(layout, layout.micro_batches(workload.global_batch))
    ranks = [
        of_rank.kinds(alive) | {"exchange": pool}
        for of_rank, alive, pool in zip(
            rank_memories(model, layout, workload), moments, pools or [0] * layout.pp, strict=True
        )
    ]
    return {kind: [bytes_[kind] for bytes_ in ranks] for kind in ranks[0]}


def peak_bytes(model: ModelSpec, layout: Layout, workload: Workload, pools: Sequence[int] = ()) -> list[int]:
    """Peak bytes of one rank, by pipeline rank."""
    return [sum(kinds) for kinds in zip(*memory_by_rank(model, layout, workload, pools).values(), strict=True)]


@lru_cache(maxsize=4096)
def _layer_bytes(
    model: ModelSpec, tokens: int, ep: int, value_bytes: int, load: float, recompute: Recompute, kind: LayerKind
) -> int:
    return layer_activation_bytes(model, tokens, ep, value_bytes, load, recompute, kind)


@lru_cache(maxsize=4096)
def _workspace_bytes(
    model: ModelSpec,
    tokens: int,
    ep: int,
    value_bytes: int,
    load: float,
    recompute: Recompute,
    kind: LayerKind,
    last: bool,
) -> int:
    backward = backward_workspace_bytes(
        model, tokens, ep, value_bytes, last=last, load=load, recompute=recompute, kind=kind
    )
    forward = combine_workspace_bytes(model, tokens, ep, value_bytes, load) * kind.moe
    return max(backward, forward - last * head_activation_bytes(model, tokens, value_bytes))


def _table_bytes(model: ModelSpec, chunks: Sequence[Held], sequence: int, value_bytes: int) -> int:
    """Cosines and sines of every layer with positions, and a mask for each window, or sinks, that asks for one."""
    layers = [each for chunk in chunks for each in chunk.kinds]
    turned = sum(count for kind, count in layers if kind.positions)
    grown = sum(count for kind, count in layers if not kind.positions) * bool(model.temperature_floor)
    sink = model.attention_sinks
    masks = {min(kind.window, sequence) % sequence for kind, _ in layers if sink or 0 < kind.window < sequence}
    return (turned * model.rope_dim + grown + len(masks) * (sequence + sink)) * sequence * value_bytes
