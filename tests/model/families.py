"""Small models of every family that trains, as `transformers` builds them, and as they lie in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

SHAPE: dict[str, Any] = {
    **{"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": None, "attn_implementation": "eager"},
}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
DEEPSEEK = {"intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3}
YARN = {
    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0},
    **{"beta_fast": 4.0, "beta_slow": 1.0},
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 16, "rope_theta": 100.0},
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: hf.MixtralConfig(
        **SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **SHAPE, intermediate_size=48, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4,
        num_experts_per_tok=2, mlp_only_layers=[0], norm_topk_prob=False,
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **SHAPE, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, head_dim=16, norm_topk_prob=True
    ),
    "olmoe": lambda: hf.OlmoeConfig(
        **SHAPE, intermediate_size=24, num_experts=4, num_experts_per_tok=2, clip_qkv=0.05
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **(SHAPE | MLA), **DEEPSEEK, n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, n_group=4,
        topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=4.0,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **(SHAPE | MLA), **DEEPSEEK, n_shared_experts=1, first_k_dense_replace=2, q_lora_rank=24, n_group=4,
        topk_group=2, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    # Kimi K2's own shape: one group, one dense layer, twice as many experts.
    "kimi_k2": lambda: hf.DeepseekV3Config(
        **(SHAPE | MLA), **(DEEPSEEK | {"n_routed_experts": 16}), n_shared_experts=1, first_k_dense_replace=1,
        q_lora_rank=24, n_group=1, topk_group=1, routed_scaling_factor=2.827,
    ),
    "glm4_moe": lambda: hf.Glm4MoeConfig(
        **SHAPE, **DEEPSEEK, n_shared_experts=1, first_k_dense_replace=1, head_dim=16, use_qk_norm=True,
        attention_bias=True, n_group=1, topk_group=1,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SHAPE, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=5,
        rope_parameters=YARN | {"truncate": False},
    ),
    # Experts in every second layer, one layer of four without positions, whose queries grow after three tokens.
    "llama4_text": lambda: hf.Llama4TextConfig(
        **SHAPE, intermediate_size=24, intermediate_size_mlp=48, head_dim=16, num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=5, floor_scale=3,
        use_qk_norm=True, rope_parameters=LLAMA3,
    ),
}  # fmt: skip
"""By name; a few layers of a few numbers that have everything the family can have."""


def build(config: Any, seed: int = 0) -> Any:
    """The model in float32 with random weights, biases, sinks and routers' state among them."""
    hf.set_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "inv_freq" not in name:
                spread = 0.3 if tensor.ndim > 1 else 0.1
                noise = torch.empty(tensor.shape).normal_(std=spread, generator=generator)
                tensor.copy_(noise + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model


def save(model: Any, folder: Path) -> Path:
    """The model as it is released: config.json and safetensors."""
    model.save_pretrained(folder)
    return folder


def save_gradients(model: Any, folder: Path) -> Path:
    """The gradients of its parameters under the names of the files, zero where there is none."""
    gradients = {
        key: torch.zeros_like(each) if each.grad is None else each.grad for key, each in model.named_parameters()
    }
    model.save_pretrained(folder, state_dict=model.state_dict() | gradients)
    return folder
