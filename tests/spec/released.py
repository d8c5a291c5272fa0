"""Released configurations as classes of `transformers`: the values of each config.json that decide sizes and sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf

MLA: dict[str, Any] = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def yarn(factor: float, mscale: float, **more: Any) -> dict[str, Any]:
    """DeepSeek's way of stretching positions."""
    given = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}
    return {"rope_parameters": given | {"mscale": mscale, "mscale_all_dim": mscale} | more}


def shape(layers: int, hidden: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    """The keys that nearly all families share."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


def mixtral(layers: int, hidden: int, heads: int, width: int) -> hf.PretrainedConfig:
    return hf.MixtralConfig(
        **shape(layers, hidden, heads, 8, 32000, intermediate_size=width, num_local_experts=8, num_experts_per_tok=2)
    )


def deepseek(kind: type, layers: int, hidden: int, heads: int, vocab: int, **more: Any) -> hf.PretrainedConfig:
    return kind(**shape(layers, hidden, heads, heads, vocab, **more))


def of_qwen3(layers: int, hidden: int, heads: int, width: int) -> hf.PretrainedConfig:
    return hf.Qwen3MoeConfig(
        **shape(layers, hidden, heads, 4, 151936, head_dim=128, moe_intermediate_size=width, intermediate_size=6144),
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )


def llama(layers: int, hidden: int, heads: int, width: int) -> hf.PretrainedConfig:
    return hf.LlamaConfig(**shape(layers, hidden, heads, 8, 128256, intermediate_size=width))


SCOUT_ROPE = {
    **{"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
    **{"original_max_position_embeddings": 8192, "rope_theta": 500000.0},
}


def llama4(experts: int, step: int) -> hf.PretrainedConfig:
    text = hf.Llama4TextConfig(
        **shape(48, 5120, 40, 8, 202048, intermediate_size=8192, intermediate_size_mlp=16384, head_dim=128),
        num_local_experts=experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=step,
        use_qk_norm=step == 1,
        **({"rope_parameters": SCOUT_ROPE} if step == 1 else {}),
    )
    vision = hf.Llama4VisionConfig(
        hidden_size=1408,
        num_hidden_layers=34,
        num_attention_heads=16,
        intermediate_size=5632,
        image_size=336,
        patch_size=14,
        vision_output_dim=4096,
        projector_input_dim=4096,
        projector_output_dim=4096,
    )
    return hf.Llama4Config(text_config=text, vision_config=vision)


def dbrx() -> hf.PretrainedConfig:
    ffn = {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_loss_weight": 0.05}
    attention = {"kv_n_heads": 8, "rope_theta": 500000.0, "clip_qkv": 8.0}
    return hf.DbrxConfig(
        d_model=6144, n_heads=48, n_layers=40, vocab_size=100352, attn_config=attention, ffn_config=ffn
    )


RELEASED: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "mixtral_8x7b": lambda: mixtral(32, 4096, 32, 14336),
    "mixtral_8x22b": lambda: mixtral(56, 6144, 48, 16384),
    "mixtral_8x22b_l60": lambda: mixtral(60, 6144, 48, 16384),
    # `transformers` has no DeepSeek V1; GLM-4.5's class without biases and QK norm is the same architecture.
    "deepseek_moe_16b": lambda: deepseek(
        hf.Glm4MoeConfig,
        *(28, 2048, 16, 102400),
        **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "first_k_dense_replace": 1, "head_dim": 128, "use_qk_norm": False},
    ),
    "deepseek_v2_lite": lambda: deepseek(
        hf.DeepseekV2Config,
        *(27, 2048, 16, 102400),
        **{"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "n_group": 1, "topk_group": 1},
        **MLA,
        **yarn(40.0, 0.707),
    ),
    "deepseek_v2": lambda: deepseek(
        hf.DeepseekV2Config,
        *(60, 5120, 128, 102400),
        **{"intermediate_size": 12288, "moe_intermediate_size": 1536, "n_routed_experts": 160, "n_shared_experts": 2},
        **{"num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": 1536, "n_group": 8, "topk_group": 3},
        **{"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
        **MLA,
        **yarn(40.0, 0.707),
    ),
    "deepseek_v3": lambda: deepseek(
        hf.DeepseekV3Config,
        *(61, 7168, 128, 129280),
        **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "n_group": 8, "topk_group": 4},
        **MLA,
        **yarn(40.0, 1.0),
    ),
    "kimi_k2": lambda: deepseek(
        hf.DeepseekV3Config,
        *(61, 7168, 64, 163840),
        **{"intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 384, "n_shared_experts": 1},
        **{"num_experts_per_tok": 8, "first_k_dense_replace": 1, "q_lora_rank": 1536, "n_group": 1, "topk_group": 1},
        **MLA,
        **yarn(32.0, 1.0, beta_fast=1.0),
        routed_scaling_factor=2.827,
    ),
    "qwen2_57b_a14b": lambda: hf.Qwen2MoeConfig(
        **shape(28, 3584, 28, 4, 151936, intermediate_size=18944, moe_intermediate_size=2560),
        shared_expert_intermediate_size=20480,
        num_experts=64,
        num_experts_per_tok=8,
    ),
    "qwen3_30b_a3b": lambda: of_qwen3(48, 2048, 32, 768),
    "qwen3_235b_a22b": lambda: of_qwen3(94, 4096, 64, 1536),
    "olmoe": lambda: hf.OlmoeConfig(
        **shape(16, 2048, 16, 16, 50304, intermediate_size=1024, num_experts=64, num_experts_per_tok=8)
    ),
    "gpt_oss_120b": lambda: hf.GptOssConfig(
        **shape(36, 2880, 64, 8, 201088, intermediate_size=2880, head_dim=64, sliding_window=128),
        num_local_experts=128,
        num_experts_per_tok=4,
    ),
    "llama4_scout": lambda: llama4(16, 1),
    "llama4_maverick": lambda: llama4(128, 2),
    "dbrx": dbrx,
    "phi_3_5_moe": lambda: hf.PhimoeConfig(
        **shape(32, 4096, 32, 8, 32064, intermediate_size=6400, attention_bias=True, lm_head_bias=True),
        num_local_experts=16,
        num_experts_per_tok=2,
    ),
    "glm_4_5": lambda: hf.Glm4MoeConfig(
        **shape(92, 5120, 96, 8, 151552, intermediate_size=12288, moe_intermediate_size=1536, head_dim=128),
        **{"n_routed_experts": 160, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3},
        attention_bias=True,
        use_qk_norm=True,
        routed_scaling_factor=2.5,
    ),
    "llama3_8b": lambda: llama(32, 4096, 32, 14336),
    "llama3_70b": lambda: llama(80, 8192, 64, 28672),
    "llama3_405b": lambda: llama(126, 16384, 128, 53248),
}
"""By the name of the preset in conf/model/."""
