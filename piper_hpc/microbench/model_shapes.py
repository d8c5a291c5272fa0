"""Shapes of one model's own matrices and attention, for the wide compute suites. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from piper_hpc.microbench.shapes import Shape
from piper_hpc.spec import ModelSpec

TOKENS = (16, 32, 64, 128, 256, 1024, 4096, 16384, 65536, 102400)
"""Rows of a matrix product: tokens of a micro-batch, or of one expert. Few rows, the skinny region, are what experts
get in fine-grained models."""

SEQUENCES = (128, 512, 1024, 2048, 4096, 8192, 32768)
HEAD_DIMS = (64, 128)
"""Measured beside the model's own."""
HEAD_SHARES = (1, 2, 8)
"""The model's heads, and those that tensor parallelism over so many ranks leaves to one: with three widths and seven
sequences at most 126 cells, a minute at half a second each."""


@dataclass(frozen=True)
class ComputeCell:
    """One operator at one shape. part: which of the model's matrices it is; flops, values: of one call, and of all
    tensors that it touches, both to see what fits before anything is allocated."""

    operator: str
    part: str
    shape: Shape
    flops: float
    values: float

    @property
    def key(self) -> str:
        """The name by which a resumed run knows it."""
        return f"{self.operator}/{self.part}/" + ",".join(f"{key}={value}" for key, value in self.shape.items())


def matrices(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Part -> (k, n): rows of tokens [m, k] are multiplied by [k, n]."""
    found = {}
    if model.attention == "mla":
        if model.q_lora_rank:
            found["query_down"] = (model.hidden, model.q_lora_rank)
        found["query_up" if model.q_lora_rank else "query"] = (model.q_lora_rank or model.hidden, model.q_dim)
        found["latent_down"] = (model.hidden, model.kv_lora_rank + model.qk_rope_dim)
        found["latent_up"] = (model.kv_lora_rank, model.heads * model.qk_nope_dim + model.v_dim)
    else:
        found["qkv"] = (model.hidden, model.q_dim + 2 * model.kv_dim)
    found["output"] = (model.v_dim, model.hidden)
    if model.experts:
        found["router"] = (model.hidden, model.experts)
        found["expert_up"] = (model.hidden, model.expert_ffn)
        found["expert_down"] = (model.expert_ffn, model.hidden)
    if model.shared_experts:
        found["shared_up"] = (model.hidden, model.shared_experts * model.shared_expert_ffn)
        found["shared_down"] = (model.shared_experts * model.shared_expert_ffn, model.hidden)
    if model.dense_layers and model.dense_ffn:
        found["dense_up"] = (model.hidden, model.dense_ffn)
        found["dense_down"] = (model.dense_ffn, model.hidden)
    found["head"] = (model.hidden, model.vocab)
    return found


def gemm_cells(model: ModelSpec) -> list[ComputeCell]:
    """Every matrix of the model over TOKENS."""
    return [
        ComputeCell("gemm", part, {"m": m, "n": n, "k": k}, 2.0 * m * n * k, float(m * k + k * n + m * n))
        for part, (k, n) in matrices(model).items()
        for m in TOKENS
    ]


def grouped_gemm_cells(model: ModelSpec, ranks: int) -> list[ComputeCell]:
    """Both matrices of the experts, over TOKENS for each expert: with the fewest experts that a rank holds when they
    are spread over `ranks`, and with up to eight of them."""
    held = sorted({max(1, model.experts // ranks), min(8, model.experts)} if model.experts else set())
    cells = []
    for part, k, n in (("up", model.hidden, model.expert_ffn), ("down", model.expert_ffn, model.hidden)):
        for experts in held:
            for tokens in (experts * each for each in TOKENS):
                shape = {"experts": experts, "tokens": tokens, "hidden": k, "ffn": n}
                values = float(tokens * (k + n) + experts * k * n)
                cells.append(ComputeCell("grouped_gemm", f"{part}_x{experts}", shape, 2.0 * tokens * k * n, values))
    return cells


def attention_cells(model: ModelSpec) -> list[ComputeCell]:
    """Attention forward and backward over sequences, heads and head widths, the model's own among them; its projections
    apart (as matrix products of so many tokens), and all together as one block."""
    cells = []
    for (heads, kv_heads), head_dim in product(_heads(model), dict.fromkeys((model.head_dim, *HEAD_DIMS))):
        part = f"heads_{heads}_of_{kv_heads}_width_{head_dim}"
        for sequence in SEQUENCES:
            shape = {"batch": 1, "heads": heads, "kv_heads": kv_heads, "sequence": sequence, "head_dim": head_dim}
            flops = 2.0 * sequence**2 * heads * head_dim
            values = 2.0 * sequence * (heads + kv_heads) * head_dim
            cells += [
                ComputeCell("attention_forward", part, shape, flops, values),
                ComputeCell("attention_backward", part, shape, 2.5 * flops, 2 * values),
            ]
    projections = matrices(model)
    names = [name for name in projections if name.startswith(("q", "latent", "output"))]
    for sequence in SEQUENCES:
        sizes = {name: projections[name] for name in names}
        cells += [
            ComputeCell("gemm", name, {"m": sequence, "n": n, "k": k}, 2.0 * sequence * n * k, _values(sequence, k, n))
            for name, (k, n) in sizes.items()
        ]
        flops = sum(2.0 * sequence * n * k for k, n in sizes.values())
        flops += sequence**2 * (model.q_dim + model.v_dim)
        values = sum(_values(sequence, k, n) for k, n in sizes.values())
        cells += [
            ComputeCell("attention_block_forward", "block", block_shape(model, sequence), flops, values),
            ComputeCell("attention_block_backward", "block", block_shape(model, sequence), 2 * flops, 2 * values),
        ]
    return sorted(dict((cell.key, cell) for cell in cells).values(), key=lambda cell: (cell.operator, cell.part))


def _heads(model: ModelSpec) -> list[tuple[int, int]]:
    """Heads, and heads of keys and values, that a rank of tensor parallelism has, most first; a group of query heads
    stays with its keys. Latent attention has keys for each head."""
    of_keys = model.heads if model.attention == "mla" else model.kv_heads
    found = []
    for share in HEAD_SHARES:
        heads, kv_heads = model.heads // share, max(1, of_keys // share)
        if model.heads % share == 0 and heads % kv_heads == 0:
            found.append((heads, kv_heads))
    return found


def _values(m: int, k: int, n: int) -> float:
    return float(m * k + k * n + m * n)


def block_shape(model: ModelSpec, sequence: int) -> Shape:
    """What the attention block of `attention_block.py` is built from; ranks of MLA are 0 for other attention."""
    mla = model.attention == "mla"
    return {
        "sequence": sequence,
        "hidden": model.hidden,
        "heads": model.heads,
        "kv_heads": model.heads if mla else model.kv_heads,
        "head_dim": model.head_dim,
        "v_head_dim": model.v_head_dim or model.head_dim,
        "q_lora_rank": model.q_lora_rank if mla else 0,
        "kv_lora_rank": model.kv_lora_rank if mla else 0,
        "qk_rope_dim": model.qk_rope_dim if mla else 0,
    }
