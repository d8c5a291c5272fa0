"""A Hugging Face config.json as a ModelSpec: the sizes of each supported family, as `transformers` builds it.

Read: what decides the number of parameters, their shapes, and the FLOPs of a token (layers, widths, heads, experts,
top_k, which layers have experts or windows, biases, norms, tied embeddings), beside rope_theta, the norm's epsilon and
the balance loss's weight.

Refused by name: a family that is not in `FAMILIES`; a size that is missing or of another type; of the keys that are
read, a value that ModelSpec cannot hold (an activation that is not gated, layers with experts or windows at uneven
distances, `moe_layer_freq` other than 1, cross attention, Arctic without its residual).

Not read, so neither refused nor told: keys that change the arithmetic but neither sizes nor FLOPs. Among them
`norm_topk_prob`, `scoring_func`, `routed_scaling_factor`, `topk_method` beyond its groups, `rope_scaling`, `clip_qkv`,
`swiglu_limit`, dropout, initialisation, `quantization_config`; the activation of GPT-2 and DBRX; and which of the gated
activations it is: ModelSpec has no field for it, and this project's executor computes SiLU also where the file says
GELU. A model trained from such a file is of the released size, not the released model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.spec import ModelSpec

Json = dict[str, Any]

GATED = ("silu", "swish", "swiglu", "gelu", "gelu_pytorch_tanh")


def from_hf(config: Json) -> ModelSpec:
    """The model that `transformers` builds from this configuration, named after its `model_type`.

    Multi-token-prediction modules (`num_nextn_predict_layers`) are not among what `transformers` builds and counts:
    `mtp_layers` of the answer is 0. An unknown family, a missing size, or a value of a key that is read which ModelSpec
    does not hold raises ConfigError that names it; what is not read is listed above.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        rule = f"is no supported family ({', '.join(FAMILIES)})"
        raise _refusal("model_type", family, rule, "model.path=<config.json of a supported family>")
    return ModelSpec(**{"name": str(family), **FAMILIES[family](config)})


def _refusal(key: str, value: object, rule: str, works: str) -> ConfigError:
    return ConfigError(Problem(f"model.path: {key}", value, rule, works))


RELEASED = "the config.json that was released with the model"


def _typed(kind: type, config: Json, key: str, least: int | None) -> Any:
    """The value, which must be of that kind (an int also where a float is meant) and, a count, at least `least`."""
    value = config[key]
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        called = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
        raise _refusal(key, value, f"must be {called[kind]}", RELEASED)
    if kind is int and least is not None and value < least:
        raise _refusal(key, value, f"must be a whole number, at least {least}", RELEASED)
    return value


def _required(config: Json, key: str, kind: type = int) -> Any:
    if config.get(key) is None:
        raise _refusal(key, None, "must be given: it decides the size of this family", RELEASED)
    return _typed(kind, config, key, least=1)


def _optional(config: Json, key: str, default: Any) -> Any:
    """A key whose absence (or null) means `default`, as in the family's configuration class.

    Counts whose default is at least 1 (steps, intervals, heads) must be so too; the others must not be negative.
    """
    least = min(default, 1) if type(default) is int else None
    return default if config.get(key) is None else _typed(type(default), config, key, least)


def _require_one_of(config: Json, key: str, allowed: Iterable[object], default: object) -> None:
    """Refuse a value that would make another model than the one that is modelled."""
    allowed = tuple(allowed)
    value = config.get(key, default)
    if value not in allowed:
        listed = ", ".join(str(each) for each in allowed)
        rule = f"is not modelled for this family; must be one of {listed}"
        raise _refusal(key, value, rule, f'"{key}": {json.dumps(allowed[0])}')


def _decoder(config: Json) -> Json:
    """What most families name alike."""
    _require_one_of(config, "hidden_act", GATED, "silu")
    hidden, heads = _required(config, "hidden_size"), _required(config, "num_attention_heads")
    rope = _optional(config, "rope_parameters", {})
    return {
        "layers": _required(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _optional(config, "num_key_value_heads", heads),
        "head_dim": _optional(config, "head_dim", hidden // heads),
        "vocab": _required(config, "vocab_size"),
        "tied_embeddings": _optional(config, "tie_word_embeddings", False),
        "rope_theta": float(_optional(config, "rope_theta", _optional(rope, "rope_theta", 10_000.0))),
        "norm_eps": float(_optional(config, "rms_norm_eps", 1e-5)),
    }


def _experts(config: Json, count: str, width: str) -> Json:
    return {
        "experts": _required(config, count),
        "top_k": _required(config, "num_experts_per_tok"),
        "expert_ffn": _required(config, width),
    } | _balance(config)


def _balance(config: Json) -> Json:
    return {"router_aux_coef": float(_optional(config, "router_aux_loss_coef", 0.0))}


NO_EXPERTS: Json = {"experts": 0, "top_k": 0, "expert_ffn": 0}


def _layer_pattern(moe: list[bool], dense_ffn: int, key: str) -> Json:
    """dense_first and moe_every of the layers that have experts; `key` is what says so, for the refusal."""
    chosen = [layer for layer, has_experts in enumerate(moe) if has_experts]
    if not chosen:
        raise _refusal(key, None, "leaves no layer with experts", "a config.json whose layers have experts")
    every = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    first = chosen[0] - every + 1
    pattern = [layer >= first and (layer - first + 1) % every == 0 for layer in range(len(moe))]
    if first < 0 or pattern != moe:
        rule = f"gives experts to layers {chosen}; modelled are leading dense layers, then experts every n-th layer"
        raise _refusal(key, chosen, rule, "an evenly spaced set of layers")
    return {"dense_first": first, "moe_every": every, "dense_ffn": 0 if all(moe) else dense_ffn}


def _windows(kinds: list[str], window: int, windowed: str) -> Json:
    """sliding_window and full_attention_every of `layer_types`."""
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if unknown := set(kinds) - {"full_attention", windowed}:
        rule = f"holds {sorted(unknown)}; modelled are full_attention and {windowed}"
        raise _refusal("layer_types", kinds, rule, f'"{windowed}"')
    if len(full) == len(kinds) or not window:
        return {}
    every = full[0] + 1 if full else 0
    if full and [kind == "full_attention" for kind in kinds] != [(n + 1) % every == 0 for n in range(len(kinds))]:
        rule = "is no pattern of one full layer behind a fixed number of windowed ones"
        raise _refusal("layer_types", kinds, rule, "full_attention at every n-th layer")
    return {"sliding_window": window, "full_attention_every": every}


def _grouped_routing(config: Json) -> Json:
    groups = _optional(config, "n_group", 1)
    if groups <= 1 or config.get("topk_method") == "greedy":
        return {}
    return {"expert_groups": groups, "groups_per_token": _required(config, "topk_group")}


def _llama(config: Json) -> Json:
    bias = _optional(config, "attention_bias", False)
    facts = _decoder(config) | NO_EXPERTS
    return facts | {
        "dense_ffn": _required(config, "intermediate_size"),
        "attention_bias": bias,
        "output_bias": bias,
        "ffn_bias": _optional(config, "mlp_bias", False),
    }


def _mixtral(config: Json) -> Json:
    window = {"sliding_window": _optional(config, "sliding_window", 0)}
    return _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | window


def _phimoe(config: Json) -> Json:
    bias = _optional(config, "attention_bias", False)
    head = {"head_bias": _optional(config, "lm_head_bias", False), "norm": "layer"}
    return _mixtral(config) | head | {"attention_bias": bias, "output_bias": bias}


def _qwen_layers(config: Json) -> Json:
    step, dense = _optional(config, "decoder_sparse_step", 1), _optional(config, "mlp_only_layers", [])
    moe = [(n + 1) % step == 0 and n not in dense for n in range(_required(config, "num_hidden_layers"))]
    return _layer_pattern(moe, _optional(config, "intermediate_size", 0), "mlp_only_layers, decoder_sparse_step")


def _qwen2_moe(config: Json) -> Json:
    facts = _decoder(config) | _experts(config, "num_experts", "moe_intermediate_size") | _qwen_layers(config)
    if _optional(config, "use_sliding_window", False):
        facts |= _windows(
            _required(config, "layer_types", list), _optional(config, "sliding_window", 0), "sliding_attention"
        )
    return facts | {
        "shared_experts": 1,
        "shared_expert_ffn": _required(config, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        "attention_bias": _optional(config, "qkv_bias", True),
    }


def _qwen3_moe(config: Json) -> Json:
    # Files of transformers 5 name the experts num_local_experts.
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    facts = _decoder(config) | _experts(config, count, "moe_intermediate_size") | _qwen_layers(config)
    bias, windowed = _optional(config, "attention_bias", False), _optional(config, "use_sliding_window", False)
    window = _optional(config, "sliding_window", 0) if windowed else 0
    return facts | {"qk_norm": "head", "attention_bias": bias, "output_bias": bias, "sliding_window": window}


def _olmoe(config: Json) -> Json:
    bias = _optional(config, "attention_bias", False)
    facts = _decoder(config) | _experts(config, "num_experts", "intermediate_size")
    return facts | {"qk_norm": "full", "attention_bias": bias, "output_bias": bias}


def _gpt_oss(config: Json) -> Json:
    bias = _optional(config, "attention_bias", True)
    layers = _required(config, "num_hidden_layers")
    alternating = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    windows = _windows(
        _optional(config, "layer_types", alternating), _optional(config, "sliding_window", 0), "sliding_attention"
    )
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | windows
    vectors = {"attention_bias": bias, "output_bias": bias, "ffn_bias": True, "router_bias": True}
    return facts | vectors | {"attention_sinks": True}


def _shared_and_dense(config: Json) -> Json:
    """Experts of the DeepSeek lineage: leading dense layers, shared experts, groups."""
    _require_one_of(config, "moe_layer_freq", (1,), 1)
    layers, first = _required(config, "num_hidden_layers"), _optional(config, "first_k_dense_replace", 0)
    facts = _experts(config, "n_routed_experts", "moe_intermediate_size") | _grouped_routing(config)
    shared = _optional(config, "n_shared_experts", 0)
    pattern = _layer_pattern(
        [n >= first for n in range(layers)], _optional(config, "intermediate_size", 0), "first_k_dense_replace"
    )
    width = facts["expert_ffn"] if shared else 0
    return facts | pattern | {"shared_experts": shared, "shared_expert_ffn": width}


def _deepseek_v1(config: Json) -> Json:
    bias = _optional(config, "attention_bias", False)
    return _decoder(config) | _shared_and_dense(config) | {"attention_bias": bias, "output_bias": bias}


def _mla(config: Json) -> Json:
    bias = _optional(config, "attention_bias", False)
    nope, rope = _required(config, "qk_nope_head_dim"), _required(config, "qk_rope_head_dim")
    heads = _required(config, "num_attention_heads")
    return (
        _decoder(config)
        | _shared_and_dense(config)
        | {
            "attention": "mla",
            "kv_heads": heads,
            "head_dim": nope + rope,
            "q_lora_rank": _optional(config, "q_lora_rank", 0),
            "kv_lora_rank": _required(config, "kv_lora_rank"),
            "qk_nope_dim": nope,
            "qk_rope_dim": rope,
            "v_head_dim": _required(config, "v_head_dim"),
            "attention_bias": bias,
            "output_bias": bias,
        }
    )


def _deepseek_v2(config: Json) -> Json:
    _require_one_of(config, "mlp_bias", (False,), False)
    return _mla(config)


def _glm4_moe(config: Json) -> Json:
    norm = "head" if _optional(config, "use_qk_norm", False) else "none"
    bias = _optional(config, "attention_bias", False)
    return _decoder(config) | _shared_and_dense(config) | {"qk_norm": norm, "attention_bias": bias}


def _llama4_text(config: Json) -> Json:
    layers, step = _required(config, "num_hidden_layers"), _optional(config, "interleave_moe_layer_step", 1)
    chosen = _optional(config, "moe_layers", list(range(step - 1, layers, step)))
    pattern = _layer_pattern(
        [n in chosen for n in range(layers)], _required(config, "intermediate_size_mlp"), "moe_layers"
    )
    every = _optional(config, "no_rope_layer_interval", 4)
    # An empty list means the default, as the configuration class reads it.
    rope = _optional(config, "no_rope_layers", []) or [(n + 1) % every != 0 for n in range(layers)]
    kinds = _optional(config, "layer_types", ["chunked_attention" if each else "full_attention" for each in rope])
    windows = _windows(kinds, _optional(config, "attention_chunk_size", 0), "chunked_attention")
    bias = _optional(config, "attention_bias", False)
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | pattern | windows
    return facts | {
        "window_kind": "chunked",
        "shared_experts": 1,
        "shared_expert_ffn": facts["expert_ffn"],
        "qk_norm": "l2" if _optional(config, "use_qk_norm", True) else "none",
        "attention_bias": bias,
        "output_bias": bias,
    }


def _llama4(config: Json) -> Json:
    facts = _llama4_text(_required(config, "text_config", dict))
    vision = _optional(config, "vision_config", {})
    return facts | {"encoder_parameters": _llama4_vision(vision, facts["hidden"]) if vision else 0}


def _llama4_vision(vision: Json, text_hidden: int) -> int:
    """Parameters of Llama 4's vision encoder and of the projector into the decoder."""
    hidden, inner = _required(vision, "hidden_size"), _required(vision, "intermediate_size")
    image, patch = _required(vision, "image_size"), _required(vision, "patch_size")
    out, projector = _required(vision, "projector_output_dim"), _required(vision, "vision_output_dim")
    attention = 4 * (hidden * hidden + hidden)
    mlp = hidden * inner + inner + inner * hidden + hidden
    layers = _required(vision, "num_hidden_layers") * (attention + mlp + 2 * 2 * hidden)
    patches = (image // patch) ** 2 + 1
    embedding = _required(vision, "num_channels") * patch**2 * hidden + hidden + patches * hidden + 2 * 2 * hidden
    adapter = inner * _required(vision, "projector_input_dim") + out * out
    return layers + embedding + adapter + projector * text_hidden


def _dbrx(config: Json) -> Json:
    attention, ffn = _required(config, "attn_config", dict), _required(config, "ffn_config", dict)
    hidden, heads = _required(config, "d_model"), _required(config, "n_heads")
    return {
        "layers": _required(config, "n_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _required(attention, "kv_n_heads"),
        "head_dim": hidden // heads,
        "vocab": _required(config, "vocab_size"),
        "experts": _required(ffn, "moe_num_experts"),
        "top_k": _required(ffn, "moe_top_k"),
        "expert_ffn": _required(ffn, "ffn_hidden_size"),
        "tied_embeddings": _optional(config, "tie_word_embeddings", False),
        "norm": "layer_no_bias",
        "rope_theta": float(_optional(attention, "rope_theta", 10_000.0)),
        "router_aux_coef": float(_optional(ffn, "moe_loss_weight", 0.01)),
    }


def _arctic(config: Json) -> Json:
    _require_one_of(config, "parallel_attn_mlp_res", (True,), None)
    # A layer with experts has three norms and a residual, a dense one two and none: a mixture is not modelled.
    _require_one_of(config, "moe_layer_frequency", (1,), None)
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size")
    return facts | {
        "dense_residual_ffn": facts["hidden"],
        "norms_per_layer": 3,
        "sliding_window": _optional(config, "sliding_window", 0),
    }


def _gpt2(config: Json) -> Json:
    _require_one_of(config, "add_cross_attention", (False,), False)
    hidden, heads = _required(config, "n_embd"), _required(config, "n_head")
    return NO_EXPERTS | {
        "layers": _required(config, "n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "vocab": _required(config, "vocab_size"),
        "dense_ffn": _optional(config, "n_inner", 4 * hidden),
        "dense_matrices": 2,
        "tied_embeddings": _optional(config, "tie_word_embeddings", True),
        "positions": _required(config, "n_positions"),
        "norm": "layer",
        "attention_bias": True,
        "output_bias": True,
        "ffn_bias": True,
        "norm_eps": float(_optional(config, "layer_norm_epsilon", 1e-5)),
    }


FAMILIES: dict[str, Callable[[Json], Json]] = {
    "mixtral": _mixtral,
    "deepseek": _deepseek_v1,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _mla,
    "kimi_k2": _mla,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "llama4": _llama4,
    "llama4_text": _llama4_text,
    "dbrx": _dbrx,
    "phimoe": _phimoe,
    "glm4_moe": _glm4_moe,
    "arctic": _arctic,
    "gpt2": _gpt2,
}
