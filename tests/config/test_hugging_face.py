"""model=hf model.path=config.json: read as it stands, and refused by name where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piper_hpc.config import ConfigError
from piper_hpc.config.hugging_face import from_hf
from piper_hpc.config.hugging_face_families import FAMILIES
from piper_hpc.spec.rope import RopeScaling
from tests.config.test_config import checked
from tests.presets import preset

RELEASED = Path(__file__).with_name("qwen3_moe.json")
CONFIG = json.loads(RELEASED.read_text())

ARCTIC = {
    "model_type": "arctic",
    **{"hidden_size": 7168, "intermediate_size": 4864, "num_hidden_layers": 35, "vocab_size": 32000},
    **{"num_attention_heads": 56, "num_key_value_heads": 8, "num_local_experts": 128, "num_experts_per_tok": 2},
    **{"moe_layer_frequency": 1, "parallel_attn_mlp_res": True, "use_residual": True, "sliding_window": None},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False},
}
KIMI_K2 = {
    "model_type": "kimi_k2",
    **{"hidden_size": 7168, "intermediate_size": 18432, "num_hidden_layers": 61, "vocab_size": 163840},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 1536, "kv_lora_rank": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048},
    **{"n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1},
    **{"n_group": 1, "topk_group": 1, "topk_method": "noaux_tc", "moe_layer_freq": 1, "aux_loss_alpha": 0.001},
    **{"rms_norm_eps": 1e-6, "rope_theta": 50000.0, "tie_word_embeddings": False, "num_nextn_predict_layers": 0},
    **{"norm_topk_prob": True, "scoring_func": "sigmoid", "routed_scaling_factor": 2.827},
    "rope_scaling": {
        **{"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
        "original_max_position_embeddings": 4096,
    },
}


def read(path: Path, **changes: object):
    path.write_text(json.dumps(CONFIG | changes))
    return checked("task=plan", "model=hf", f"model.path={path}").model


def test_a_released_file_is_the_preset():
    read = checked("task=plan", "model=hf", f"model.path={RELEASED}").model
    assert vars(read) | {"name": "qwen3_30b_a3b"} == vars(preset("qwen3_30b_a3b"))


@pytest.mark.parametrize(("name", "config"), [("arctic", ARCTIC), ("kimi_k2", KIMI_K2)])
def test_families_that_transformers_lacks_are_their_presets(name, config):
    facts = {"router_aux_coef": preset(name).router_aux_coef}
    assert vars(from_hf(config)) | facts == vars(preset(name))


def test_keys_beside_the_file_win():
    found = checked("task=plan", "model=hf", f"model.path={RELEASED}", "model.layers=4", "model.name=cut").model
    assert (found.layers, found.name, found.hidden) == (4, "cut", 2048)


def test_what_changes_a_size_is_read(tmp_path):
    whole = read(tmp_path / "config.json")
    assert read(tmp_path / "config.json", num_experts=64).experts == 64
    assert read(tmp_path / "config.json", tie_word_embeddings=True).parameters == whole.parameters - 151936 * 2048
    dense = read(tmp_path / "config.json", mlp_only_layers=[0, 1])
    assert (dense.dense_layers, dense.dense_ffn) == (2, 6144)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["model_type = 'mamba'", "no supported family", *FAMILIES]),
        ({"model_type": None}, ["model_type = None"]),
        ({"hidden_size": None}, ["hidden_size = None", "must be given"]),
        ({"hidden_act": "relu"}, ["hidden_act = 'relu'", "silu"]),
        ({"mlp_only_layers": [3]}, ["mlp_only_layers", "leading dense layers"]),
        ({"mlp_only_layers": list(range(48))}, ["mlp_only_layers", "no layer with experts"]),
        ({"num_key_value_heads": 5}, ["model.kv_heads = 5", "divide", "model.kv_heads=32"]),
        ({"num_attention_heads": 0}, ["num_attention_heads = 0", "at least 1"]),
        ({"decoder_sparse_step": 0}, ["decoder_sparse_step = 0", "at least 1"]),
        ({"attention_bias": "yes"}, ["attention_bias = 'yes'", "true or false"]),
        ({"num_hidden_layers": "many"}, ["num_hidden_layers = 'many'", "whole number"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_modelled_is_refused_by_name(changes, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "config.json", **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read"), ("{", "is not JSON"), ("[1]", "no JSON object"), ("\x00\xff", "is not JSON")],
)
def test_a_file_that_is_no_configuration_is_told(text, words, tmp_path):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=words):
        checked("task=plan", "model=hf", f"model.path={path}")


def test_the_path_must_be_given():
    with pytest.raises(ConfigError, match=r"model\.path.*must be given.*model\.path=config\.json"):
        checked("task=plan", "model=hf")


def test_windows_that_fit_no_pattern_are_refused():
    gpt = {"model_type": "gpt_oss", "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    config = {
        **{"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 100},
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 8},
    }
    with pytest.raises(ConfigError, match="layer_types"):
        from_hf(config | gpt)
    assert from_hf(config | {"model_type": "gpt_oss"}).windows == (8, 0, 8)


@pytest.mark.parametrize(
    ("key", "value", "fact", "read_as"),
    [
        ("norm_topk_prob", False, "normalised_weights", False),
        ("hidden_act", "gelu", "activation", "gelu"),
        ("partial_rotary_factor", 0.5, "rope_fraction", 0.5),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
            "rope_scaling",
            RopeScaling("yarn", 4.0, 32768),
        ),
    ],
)
def test_what_changes_the_arithmetic_alone_is_read_too(key, value, fact, read_as):
    assert getattr(from_hf(CONFIG | {key: value}), fact) == read_as


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (KIMI_K2, "scoring_func", "softmax"),
        (KIMI_K2, "topk_method", "greedy"),
        (CONFIG, "attention_dropout", 0.1),
        (CONFIG, "rope_scaling", {"type": "dynamic", "factor": 4}),
    ],
)
def test_arithmetic_that_is_not_modelled_is_refused_by_name(config, key, value):
    with pytest.raises(ConfigError, match=key):
        from_hf(config | {key: value})
