"""Where each of our tensors lies in the files of a Hugging Face model, by family."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from piper_hpc.spec.model import ModelSpec


@dataclass(frozen=True)
class Place:
    """A tensor of ours as a part of one in the files: file[expert][..., start::step][: width], transposed.

    tensor: the file's name of it; expert: its index in a stack, None where there is none; start, step: which columns of
    the last dimension are ours, those from `start` on in steps of `step`, `width` of them, 0 for all.
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    step: int = 1
    width: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """How a family names things.

    prefix: before the decoder's names; moe, dense: modules of a layer; words: for w1, w3, w2 of ours; own_norms: those
    before attention and feed-forward.
    stacked: empty where every expert has tensors of its own; `halves` where gate and up lie side by side in one,
    `turns` where their columns alternate; both of [experts, in, out].
    """

    moe: str = "mlp"
    dense: str = "mlp"
    words: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    router: str = "gate"
    shared: str = "shared_experts"
    stacked: str = ""
    prefix: str = "model."
    head: str = "lm_head"
    own_norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


MIXTRAL = Family(moe="block_sparse_moe", words=("w1", "w3", "w2"))
FAMILIES: dict[str, Family] = {
    "mixtral": MIXTRAL,
    "arctic": MIXTRAL,
    "qwen2_moe": Family(shared="shared_expert"),
    "qwen3_moe": Family(),
    "olmoe": Family(),
    "deepseek": Family(),
    "deepseek_v2": Family(),
    "deepseek_v3": Family(),
    "kimi_k2": Family(),
    "glm4_moe": Family(),
    "gpt_oss": Family(router="router", stacked="turns"),
    "llama4_text": Family(
        moe="feed_forward", dense="feed_forward", router="router", shared="shared_expert", stacked="halves"
    ),
    "llama4": Family(
        moe="feed_forward", dense="feed_forward", router="router", shared="shared_expert", stacked="halves",
        prefix="language_model.model.", head="language_model.lm_head",
    ),
}  # fmt: skip
"""By `model_type`; families that can be converted."""

ATTENTION = {
    **{"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_norm": "q_norm", "k_norm": "k_norm"},
    **{"query": "q_proj", "query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query_up": "q_b_proj"},
    **{"latent_down": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm", "latent_up": "kv_b_proj"},
}
"""Ours -> the file's, of a layer's attention."""

STATE = {"selection_bias": "e_score_correction_bias"}
"""Ours -> the file's, of a router."""

ENDS = {"embedding.weight": "embed_tokens.weight", "norm.weight": "norm.weight", "norm.bias": "norm.bias"}

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"experts\.(\d+)\.(w[123])(_bias)?")


def place_of(family: Family, spec: ModelSpec, name: str) -> Place:
    """Where the tensor that we call `name` lies. Raises KeyError for a name that no model of the family has."""
    if name.startswith("head."):
        return Place(f"{family.head}.{name.removeprefix('head.')}")
    if name in ENDS:
        return Place(f"{family.prefix}{ENDS[name]}")
    found = _LAYER.fullmatch(name)
    if found is None:
        raise KeyError(name)
    layer, rest = int(found[1]), found[2]
    prefix = f"{family.prefix}layers.{layer}."
    return _in_layer(family, spec, prefix, rest)


def _in_layer(family: Family, spec: ModelSpec, prefix: str, rest: str) -> Place:
    moe = f"{prefix}{family.moe}."
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        return _expert(family, spec, moe, int(expert[1]), expert[2], bool(expert[3]))
    module, _, end = rest.rpartition(".")
    if module == "attention":
        return Place(f"{prefix}self_attn.{end}")  # sinks
    if module.startswith("attention."):
        return Place(f"{prefix}self_attn.{ATTENTION[module.removeprefix('attention.')]}.{end}")
    words = dict(zip(("w1", "w3", "w2"), family.words, strict=True))
    simple: dict[str, Callable[[], str]] = {
        "attention_norm": lambda: f"{prefix}{family.own_norms[0]}",
        "router_norm": lambda: f"{prefix}{family.own_norms[1]}",
        "ffn_norm": lambda: f"{prefix}{family.own_norms[1]}",
        "residual_norm": lambda: f"{prefix}residual_layernorm",
        "router.gate": lambda: f"{moe}{family.router}",
        "shared.gate": lambda: f"{moe}shared_expert_gate",
    }
    if module in simple:
        return Place(f"{simple[module]()}.{end}")
    if module == "router":
        return Place(f"{moe}{family.router}.{STATE[end]}")
    owner, _, matrix = module.rpartition(".")
    folders = {
        "ffn": f"{prefix}{family.dense}",
        "shared.ffn": f"{moe}{family.shared}",
        "residual": f"{prefix}residual_mlp",
    }
    return Place(f"{folders[owner]}.{words[matrix]}.{end}")


def _expert(family: Family, spec: ModelSpec, moe: str, expert: int, matrix: str, bias: bool) -> Place:
    """One matrix of one expert, ours [in, out], or its bias [out]."""
    words = dict(zip(("w1", "w3", "w2"), family.words, strict=True))
    if not family.stacked:
        kind = "bias" if bias else "weight"
        return Place(f"{moe}experts.{expert}.{words[matrix]}.{kind}", transposed=not bias)
    ending = "_bias" if bias else ""
    if matrix == "w2":
        return Place(f"{moe}experts.down_proj{ending}", expert)
    tensor, up, width = f"{moe}experts.gate_up_proj{ending}", matrix == "w3", spec.expert_ffn
    if family.stacked == "turns":
        return Place(tensor, expert, start=int(up), step=2, width=width)
    return Place(tensor, expert, start=int(up) * width, width=width)
