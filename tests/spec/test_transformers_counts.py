"""Presets and the reader of config.json against `transformers`: whole models on the meta device, counted exactly."""

from __future__ import annotations

import dataclasses
import json

import pytest

hf = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

from piper_hpc.config.hugging_face import from_hf  # noqa: E402
from piper_hpc.spec import ModelSpec  # noqa: E402
from tests.presets import preset  # noqa: E402
from tests.spec.released import MLA, RELEASED, shape  # noqa: E402

NOT_IN_CONFIG = ("name", "rope_theta", "norm_eps", "router_aux_coef", "router_z_coef", "mtp_layers")
"""Facts that classes have other defaults of, or that no file has."""
OF_ANOTHER_CLASS = {
    "deepseek_moe_16b": ("router_score", "selection_bias", "fp32_gate", "normalised_weights", "rope_fraction"),
    "phi_3_5_moe": ("rope_scaling",),
}
"""Facts in which a stand-in, or a class without its release's lists, differs."""


def build(config):
    """The whole model without memory for its weights."""
    multimodal = config.model_type == "llama4"
    kind = hf.AutoModelForImageTextToText if multimodal else hf.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def routed(model) -> int:
    named = model.named_parameters()
    return sum(each.numel() for name, each in named if ".experts." in name and "shared" not in name)


def read(config) -> ModelSpec:
    return from_hf(json.loads(config.to_json_string()))


@pytest.mark.parametrize("name", RELEASED)
def test_a_preset_counts_what_transformers_builds(name):
    config = RELEASED[name]()
    model = build(config)
    spec = dataclasses.replace(preset(name), mtp_layers=0)
    assert spec.parameters == count(model)
    experts = routed(model)
    assert experts == spec.moe_layers * spec.experts * spec.expert_parameters
    if experts:
        idle = experts // spec.experts * (spec.experts - spec.top_k)
        assert spec.active_parameters == count(model) - idle - spec.encoder_parameters


@pytest.mark.parametrize("name", RELEASED)
def test_its_config_json_is_read_as_the_same_facts(name):
    left_out = (*NOT_IN_CONFIG, *OF_ANOTHER_CLASS.get(name, ()))

    def compared(spec: ModelSpec) -> dict[str, object]:
        return {key: value for key, value in vars(spec).items() if key not in left_out}

    assert compared(read(RELEASED[name]())) == compared(preset(name))


def small(**more):
    return shape(6, 64, 8, 2, 500, **more)


TINY_MLA = MLA | {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {"intermediate_size": 160, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
VARIANTS = {
    "llama with every bias, tied": lambda: hf.LlamaConfig(
        **small(intermediate_size=96, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16)
    ),
    "mixtral with a window, tied": lambda: hf.MixtralConfig(
        **small(intermediate_size=96, num_local_experts=4, sliding_window=32, tie_word_embeddings=True)
    ),
    "qwen2 with dense layers": lambda: hf.Qwen2MoeConfig(
        **small(intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=8),
        mlp_only_layers=[0, 1],
        qkv_bias=False,
    ),
    "qwen3 with experts in every second layer": lambda: hf.Qwen3MoeConfig(
        **small(intermediate_size=96, moe_intermediate_size=32, head_dim=24, num_experts=8),
        decoder_sparse_step=2,
        attention_bias=True,
    ),
    "olmoe with grouped keys and biases": lambda: hf.OlmoeConfig(
        **small(intermediate_size=32, num_experts=8, num_experts_per_tok=2, attention_bias=True)
    ),
    "gpt_oss without attention biases": lambda: hf.GptOssConfig(
        **small(intermediate_size=32, head_dim=16, num_local_experts=8, attention_bias=False)
    ),
    "deepseek_v2 with biases and a full query": lambda: hf.DeepseekV2Config(
        **(small(attention_bias=True, q_lora_rank=None, n_shared_experts=2) | {"num_key_value_heads": 8}),
        **DEEPSEEK,
        **TINY_MLA,
    ),
    "deepseek_v3 with biases": lambda: hf.DeepseekV3Config(
        **(small(attention_bias=True, q_lora_rank=40, n_shared_experts=1) | {"num_key_value_heads": 8}),
        **DEEPSEEK,
        **TINY_MLA,
        n_group=2,
        topk_group=1,
    ),
    "glm4 with neither bias nor norm": lambda: hf.Glm4MoeConfig(
        **small(head_dim=24, use_qk_norm=False, first_k_dense_replace=2), **DEEPSEEK
    ),
    "phimoe without biases": lambda: hf.PhimoeConfig(**small(intermediate_size=96, num_local_experts=4)),
    "llama4 text alone": lambda: hf.Llama4TextConfig(
        **small(intermediate_size=32, intermediate_size_mlp=96, head_dim=16, num_local_experts=4),
        interleave_moe_layer_step=3,
        attention_bias=True,
    ),
    "gpt2": lambda: hf.GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=128, vocab_size=500),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_family_allows_beside_its_release_is_counted_too(variant):
    config = VARIANTS[variant]()
    assert read(config).parameters == count(build(config))
