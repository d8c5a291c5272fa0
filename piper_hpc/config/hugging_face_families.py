"""What each family of Hugging Face models says of a ModelSpec, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable

from piper_hpc.config.hugging_face_keys import (
    Json,
    activation,
    optional,
    refusal,
    require_one_of,
    required,
    rope_fraction,
    rope_scaling,
    rope_theta,
)


def _decoder(config: Json) -> Json:
    """What most families name alike."""
    hidden, heads = required(config, "hidden_size"), required(config, "num_attention_heads")
    return {
        "layers": required(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": optional(config, "num_key_value_heads", heads),
        "head_dim": optional(config, "head_dim", hidden // heads),
        "vocab": required(config, "vocab_size"),
        "tied_embeddings": optional(config, "tie_word_embeddings", False),
        "activation": activation(config),
        "rope_theta": rope_theta(config),
        "rope_fraction": rope_fraction(config, 1.0),
        "rope_scaling": rope_scaling(config),
        "norm_eps": float(optional(config, "rms_norm_eps", 1e-5)),
    }


def _experts(config: Json, count: str, width: str) -> Json:
    return {
        "experts": required(config, count),
        "top_k": required(config, "num_experts_per_tok"),
        "expert_ffn": required(config, width),
    } | _balance(config)


def _balance(config: Json) -> Json:
    alpha = float(optional(config, "aux_loss_alpha", 0.0))  # DeepSeek's name
    return {"router_aux_coef": float(optional(config, "router_aux_loss_coef", alpha))}


def _normalised(config: Json, default: bool) -> Json:
    return {"normalised_weights": optional(config, "norm_topk_prob", default)}


NO_EXPERTS: Json = {"experts": 0, "top_k": 0, "expert_ffn": 0}


def _layer_pattern(moe: list[bool], dense_ffn: int, key: str) -> Json:
    """dense_first and moe_every of the layers that have experts; `key` is what says so, for the refusal."""
    chosen = [layer for layer, has_experts in enumerate(moe) if has_experts]
    if not chosen:
        raise refusal(key, None, "leaves no layer with experts", "a config.json whose layers have experts")
    every = chosen[1] - chosen[0] if len(chosen) > 1 else 1
    first = chosen[0] - every + 1
    pattern = [layer >= first and (layer - first + 1) % every == 0 for layer in range(len(moe))]
    if first < 0 or pattern != moe:
        rule = f"gives experts to layers {chosen}; modelled are leading dense layers, then experts every n-th layer"
        raise refusal(key, chosen, rule, "an evenly spaced set of layers")
    return {"dense_first": first, "moe_every": every, "dense_ffn": 0 if all(moe) else dense_ffn}


def _windows(kinds: list[str], window: int, windowed: str) -> Json:
    """sliding_window and full_attention_every of `layer_types`."""
    full = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if unknown := set(kinds) - {"full_attention", windowed}:
        rule = f"holds {sorted(unknown)}; modelled are full_attention and {windowed}"
        raise refusal("layer_types", kinds, rule, f'"{windowed}"')
    if len(full) == len(kinds) or not window:
        return {}
    every = full[0] + 1 if full else 0
    if full and [kind == "full_attention" for kind in kinds] != [(n + 1) % every == 0 for n in range(len(kinds))]:
        rule = "is no pattern of one full layer behind a fixed number of windowed ones"
        raise refusal("layer_types", kinds, rule, "full_attention at every n-th layer")
    return {"sliding_window": window, "full_attention_every": every}


def _grouped_routing(config: Json) -> Json:
    groups = optional(config, "n_group", 1)
    if groups <= 1 or config.get("topk_method") == "greedy":
        return {}
    return {"expert_groups": groups, "groups_per_token": required(config, "topk_group")}


def _llama(config: Json) -> Json:
    bias = optional(config, "attention_bias", False)
    facts = _decoder(config) | NO_EXPERTS
    return facts | {
        "dense_ffn": required(config, "intermediate_size"),
        "attention_bias": bias,
        "output_bias": bias,
        "ffn_bias": optional(config, "mlp_bias", False),
    }


def _mixtral(config: Json) -> Json:
    window = {"sliding_window": optional(config, "sliding_window", 0)}
    return _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | window


def _phimoe(config: Json) -> Json:
    bias = optional(config, "attention_bias", False)
    head = {"head_bias": optional(config, "lm_head_bias", False), "norm": "layer"}
    facts = {"attention_bias": bias, "output_bias": bias, "router_score": "sparsemixer"}
    return _mixtral(config) | head | facts


def _qwen_layers(config: Json) -> Json:
    step, dense = optional(config, "decoder_sparse_step", 1), optional(config, "mlp_only_layers", [])
    moe = [(n + 1) % step == 0 and n not in dense for n in range(required(config, "num_hidden_layers"))]
    return _layer_pattern(moe, optional(config, "intermediate_size", 0), "mlp_only_layers, decoder_sparse_step")


def _qwen2_moe(config: Json) -> Json:
    facts = _decoder(config) | _experts(config, "num_experts", "moe_intermediate_size") | _qwen_layers(config)
    if optional(config, "use_sliding_window", False):
        facts |= _windows(
            required(config, "layer_types", list), optional(config, "sliding_window", 0), "sliding_attention"
        )
    facts |= _normalised(config, False)
    return facts | {
        "shared_experts": 1,
        "shared_expert_ffn": required(config, "shared_expert_intermediate_size"),
        "shared_expert_gate": True,
        "attention_bias": optional(config, "qkv_bias", True),
    }


def _qwen3_moe(config: Json) -> Json:
    # Files of transformers 5 name the experts num_local_experts.
    count = "num_experts" if "num_experts" in config else "num_local_experts"
    facts = _decoder(config) | _experts(config, count, "moe_intermediate_size") | _qwen_layers(config)
    facts |= _normalised(config, False)
    bias, windowed = optional(config, "attention_bias", False), optional(config, "use_sliding_window", False)
    window = optional(config, "sliding_window", 0) if windowed else 0
    return facts | {"qk_norm": "head", "attention_bias": bias, "output_bias": bias, "sliding_window": window}


def _olmoe(config: Json) -> Json:
    bias = optional(config, "attention_bias", False)
    facts = _decoder(config) | _experts(config, "num_experts", "intermediate_size") | _normalised(config, False)
    clip = {"clip_qkv": float(optional(config, "clip_qkv", 0.0))}
    return facts | clip | {"qk_norm": "full", "attention_bias": bias, "output_bias": bias}


def _gpt_oss(config: Json) -> Json:
    bias = optional(config, "attention_bias", True)
    layers = required(config, "num_hidden_layers")
    alternating = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    windows = _windows(
        optional(config, "layer_types", alternating), optional(config, "sliding_window", 0), "sliding_attention"
    )
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | windows
    vectors = {"attention_bias": bias, "output_bias": bias, "ffn_bias": True, "router_bias": True}
    require_one_of(config, "swiglu_alpha", (1.702,), 1.702)
    limit = {"swiglu_limit": float(optional(config, "swiglu_limit", 7.0))}
    return facts | vectors | limit | {"attention_sinks": True}


def _shared_and_dense(config: Json) -> Json:
    """Experts of the DeepSeek lineage: leading dense layers, shared experts, groups."""
    require_one_of(config, "moe_layer_freq", (1,), 1)
    layers, first = required(config, "num_hidden_layers"), optional(config, "first_k_dense_replace", 0)
    facts = _experts(config, "n_routed_experts", "moe_intermediate_size") | _grouped_routing(config)
    shared = optional(config, "n_shared_experts", 0)
    pattern = _layer_pattern(
        [n >= first for n in range(layers)], optional(config, "intermediate_size", 0), "first_k_dense_replace"
    )
    width = facts["expert_ffn"] if shared else 0
    scale = {"routed_scale": float(optional(config, "routed_scaling_factor", 1.0))}
    return facts | pattern | scale | {"shared_experts": shared, "shared_expert_ffn": width}


def _deepseek_v1(config: Json) -> Json:
    require_one_of(config, "scoring_func", ("softmax",), "softmax")
    bias = optional(config, "attention_bias", False)
    facts = _decoder(config) | _shared_and_dense(config) | _normalised(config, False)
    return facts | {"attention_bias": bias, "output_bias": bias}


def _bias_balanced(config: Json, scale: float) -> Json:
    """Sigmoid scores, and a bias on the choice instead of a loss (DeepSeek-V3, GLM-4.5). scale: the class's default."""
    require_one_of(config, "scoring_func", ("sigmoid",), "sigmoid")
    require_one_of(config, "topk_method", ("noaux_tc",), "noaux_tc")
    facts = {"router_score": "sigmoid", "selection_bias": True, "fp32_gate": True}
    scaled = {"routed_scale": float(optional(config, "routed_scaling_factor", scale))}
    return facts | scaled | _normalised(config, True)


def _mla(config: Json) -> Json:
    bias = optional(config, "attention_bias", False)
    nope, rope = required(config, "qk_nope_head_dim"), required(config, "qk_rope_head_dim")
    heads = required(config, "num_attention_heads")
    return (
        _decoder(config)
        | _shared_and_dense(config)
        | {
            "attention": "mla",
            "kv_heads": heads,
            "head_dim": nope + rope,
            "q_lora_rank": optional(config, "q_lora_rank", 0),
            "kv_lora_rank": required(config, "kv_lora_rank"),
            "qk_nope_dim": nope,
            "qk_rope_dim": rope,
            "v_head_dim": required(config, "v_head_dim"),
            "rope_interleaved": optional(config, "rope_interleave", True),
            "attention_bias": bias,
            "output_bias": bias,
        }
    )


def _deepseek_v2(config: Json) -> Json:
    require_one_of(config, "mlp_bias", (False,), False)
    require_one_of(config, "scoring_func", ("softmax",), "softmax")
    require_one_of(config, "norm_topk_prob", (False,), False)
    require_one_of(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy")
    return _mla(config) | {"normalised_weights": False, "fp32_gate": True}


def _deepseek_v3(config: Json) -> Json:
    return _mla(config) | _bias_balanced(config, 2.5)


def _glm4_moe(config: Json) -> Json:
    norm = "head" if optional(config, "use_qk_norm", False) else "none"
    bias = optional(config, "attention_bias", False)
    facts = _decoder(config) | _shared_and_dense(config) | _bias_balanced(config, 1.0)
    return facts | {"qk_norm": norm, "attention_bias": bias, "rope_fraction": rope_fraction(config, 0.5)}


def _llama4_text(config: Json) -> Json:
    layers, step = required(config, "num_hidden_layers"), optional(config, "interleave_moe_layer_step", 1)
    chosen = optional(config, "moe_layers", list(range(step - 1, layers, step)))
    pattern = _layer_pattern(
        [n in chosen for n in range(layers)], required(config, "intermediate_size_mlp"), "moe_layers"
    )
    every = optional(config, "no_rope_layer_interval", 4)
    # An empty list means the default, as the configuration class reads it.
    rope = optional(config, "no_rope_layers", []) or [(n + 1) % every != 0 for n in range(layers)]
    kinds = optional(config, "layer_types", ["chunked_attention" if each else "full_attention" for each in rope])
    windows = _windows(kinds, optional(config, "attention_chunk_size", 0), "chunked_attention")
    bias = optional(config, "attention_bias", False)
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size") | pattern | windows
    facts |= _layers_without_positions([bool(each) for each in rope])
    if optional(config, "attn_temperature_tuning", True):
        floor, scale = optional(config, "floor_scale", 8192), optional(config, "attn_scale", 0.1)
        facts |= {"temperature_floor": int(floor), "temperature_scale": float(scale)}
    return facts | {
        "rope_interleaved": True,
        "router_score": "sigmoid",
        "normalised_weights": False,
        "weighted_input": True,
        "window_kind": "chunked",
        "shared_experts": 1,
        "shared_expert_ffn": facts["expert_ffn"],
        "qk_norm": "l2" if optional(config, "use_qk_norm", True) else "none",
        "attention_bias": bias,
        "output_bias": bias,
    }


def _layers_without_positions(rope: list[bool]) -> Json:
    """nope_every of which layers turn queries and keys."""
    every = rope.index(False) + 1 if False in rope else 0
    if rope != [not every or (n + 1) % every != 0 for n in range(len(rope))]:
        works = "layers without positions at every n-th layer"
        raise refusal("no_rope_layers", rope, "is no pattern of one such layer behind a fixed number of others", works)
    return {"nope_every": every}


def _llama4(config: Json) -> Json:
    facts = _llama4_text(required(config, "text_config", dict))
    vision = optional(config, "vision_config", {})
    return facts | {"encoder_parameters": _llama4_vision(vision, facts["hidden"]) if vision else 0}


def _llama4_vision(vision: Json, text_hidden: int) -> int:
    """Parameters of Llama 4's vision encoder and of the projector into the decoder."""
    hidden, inner = required(vision, "hidden_size"), required(vision, "intermediate_size")
    image, patch = required(vision, "image_size"), required(vision, "patch_size")
    out, projector = required(vision, "projector_output_dim"), required(vision, "vision_output_dim")
    attention = 4 * (hidden * hidden + hidden)
    mlp = hidden * inner + inner + inner * hidden + hidden
    layers = required(vision, "num_hidden_layers") * (attention + mlp + 2 * 2 * hidden)
    patches = (image // patch) ** 2 + 1
    embedding = required(vision, "num_channels") * patch**2 * hidden + hidden + patches * hidden + 2 * 2 * hidden
    adapter = inner * required(vision, "projector_input_dim") + out * out
    return layers + embedding + adapter + projector * text_hidden


def _dbrx(config: Json) -> Json:
    attention, ffn = required(config, "attn_config", dict), required(config, "ffn_config", dict)
    hidden, heads = required(config, "d_model"), required(config, "n_heads")
    require_one_of(ffn, "moe_normalize_expert_weights", (1, None), 1)  # the norm's order
    return {
        "layers": required(config, "n_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": required(attention, "kv_n_heads"),
        "head_dim": hidden // heads,
        "vocab": required(config, "vocab_size"),
        "experts": required(ffn, "moe_num_experts"),
        "top_k": required(ffn, "moe_top_k"),
        "expert_ffn": required(ffn, "ffn_hidden_size"),
        "tied_embeddings": optional(config, "tie_word_embeddings", False),
        "norm": "layer_no_bias",
        "clip_qkv": float(optional(attention, "clip_qkv", 0.0)),
        "activation": activation(optional(ffn, "ffn_act_fn", {}), "name"),
        "normalised_weights": ffn.get("moe_normalize_expert_weights", 1) is not None,
        "rope_theta": float(optional(attention, "rope_theta", 10_000.0)),
        "router_aux_coef": float(optional(ffn, "moe_loss_weight", 0.01)),
    }


def _arctic(config: Json) -> Json:
    require_one_of(config, "parallel_attn_mlp_res", (True,), None)
    # A layer with experts has three norms and a residual, a dense one two and none: a mixture is not modelled.
    require_one_of(config, "moe_layer_frequency", (1,), None)
    facts = _decoder(config) | _experts(config, "num_local_experts", "intermediate_size")
    return facts | {
        "dense_residual_ffn": facts["hidden"],
        "norms_per_layer": 3,
        "sliding_window": optional(config, "sliding_window", 0),
    }


def _gpt2(config: Json) -> Json:
    require_one_of(config, "add_cross_attention", (False,), False)
    hidden, heads = required(config, "n_embd"), required(config, "n_head")
    return NO_EXPERTS | {
        "layers": required(config, "n_layer"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": hidden // heads,
        "vocab": required(config, "vocab_size"),
        "dense_ffn": optional(config, "n_inner", 4 * hidden),
        "dense_matrices": 2,
        "tied_embeddings": optional(config, "tie_word_embeddings", True),
        "positions": required(config, "n_positions"),
        "norm": "layer",
        "activation": activation(config, "activation_function", "gelu_new"),
        "attention_bias": True,
        "output_bias": True,
        "ffn_bias": True,
        "norm_eps": float(optional(config, "layer_norm_epsilon", 1e-5)),
    }


FAMILIES: dict[str, Callable[[Json], Json]] = {
    "mixtral": _mixtral,
    "deepseek": _deepseek_v1,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "kimi_k2": _deepseek_v3,
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

PLANNED_ALONE = ("phimoe", "gpt2")
"""Families that the executor lacks something of: their dropout and noise change nothing that a plan says."""
