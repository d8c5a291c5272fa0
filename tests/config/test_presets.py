"""Every preset's size beside the one in print, and which presets the executor refuses to train."""

from __future__ import annotations

import dataclasses
import re

import pytest

from piper_hpc.config import ConfigError
from piper_hpc.config.schema import ModelConfig
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.executor import missing_of_model
from tests.config.test_config import checked
from tests.presets import preset

PRESETS = sorted(path.stem for path in (data_folder("conf") / "model").glob("*.yaml") if path.stem != "hf")

WHOLE, NO_EMBEDDING = "all parameters", "without embedding and head"

# name, printed total and active in billions, what that counts, where it is printed.
PRINTED = [
    ("mixtral_8x7b", 46.7, 12.9, WHOLE, "Mistral's announcement, December 2023"),
    ("mixtral_8x22b", 140.6, 39.15, WHOLE, "model page: 141B, 39B active"),
    ("deepseek_moe_16b", 16.4, 2.8, WHOLE, "arXiv 2401.06066"),
    ("deepseek_v2_lite", 15.7, 2.66, WHOLE, "arXiv 2405.04434 appendix B"),
    ("deepseek_v2", 236, 21.4, WHOLE, "arXiv 2405.04434"),
    ("deepseek_v3", 671, 37.5, WHOLE, "arXiv 2412.19437: 671B, 37B active"),
    ("kimi_k2", 1026, 32.9, WHOLE, "tensors of the model page; printed 1T, 32B active"),
    ("qwen2_57b_a14b", 57.4, 14.2, WHOLE, "arXiv 2407.10671: 57B, 14B active"),
    ("qwen3_30b_a3b", 30.5, 3.35, WHOLE, "model page: 30.5B, 3.3B active"),
    ("qwen3_235b_a22b", 235, 22.2, WHOLE, "arXiv 2505.09388: 235B, 22B active"),
    ("olmoe", 6.92, 1.28, WHOLE, "arXiv 2409.02060: 6.9B, 1.3B active"),
    ("gpt_oss_120b", 116.83, None, WHOLE, "arXiv 2508.10925 table 1: 116.83B"),
    ("llama4_scout", 109, 17.2, WHOLE, "model page: 109B, 17B active"),
    ("llama4_maverick", 400, 17.2, WHOLE, "model page: 400B, 17B active"),
    ("arctic", 480, 17.3, WHOLE, "Snowflake's announcement, April 2024: 480B, 17B active"),
    ("dbrx", 132, 36.4, WHOLE, "Databricks' announcement, March 2024: 132B, 36B active"),
    ("grok_1", 314, None, NO_EMBEDDING, "xAI's announcement, March 2024"),
    ("glm_4_5", 355, 32.4, NO_EMBEDDING, "arXiv 2508.06471 table 1: 355B, 32B active, with MTP"),
    ("phi_3_5_moe", 41.9, 6.6, WHOLE, "model page: 16 x 3.8B, 41.9B, 6.6B active"),
    ("gpt3_22b", 22, None, WHOLE, "arXiv 2205.05198 table 3"),
    ("gpt3_175b", 175, None, WHOLE, "arXiv 2205.05198 table 3"),
    ("gpt3_530b", 530, None, WHOLE, "arXiv 2205.05198 table 3"),
    ("gpt3_1t", 1008, None, WHOLE, "arXiv 2104.04473 table 1: 1008.0B"),
    ("llama3_8b", 8.03, None, WHOLE, "model page; printed 8B"),
    ("llama3_70b", 70.6, None, WHOLE, "model page; printed 70B"),
    ("llama3_405b", 405.9, None, WHOLE, "model page; printed 405B"),
]


def counted(total: int, spec: ModelSpec, what: str) -> int:
    return total - (spec.embedding_parameters + spec.head_parameters if what == NO_EMBEDDING else 0)


@pytest.mark.parametrize(("name", "total", "active", "what", "_source"), PRINTED, ids=[row[0] for row in PRINTED])
def test_sizes_are_those_in_print(name, total, active, what, _source):
    spec = preset(name)
    assert counted(spec.parameters, spec, what) / 1e9 == pytest.approx(total, rel=5e-3)
    if active is not None:
        assert counted(spec.active_parameters, spec, what) / 1e9 == pytest.approx(active, rel=1.5e-2)


def test_every_preset_has_a_printed_size_or_is_counted_elsewhere():
    held_by_the_papers = {name for name in PRESETS if name.startswith(("xmoe", "m10b", "mixtral_8x22b_l60"))}
    assert {row[0] for row in PRINTED} | held_by_the_papers | {"tiny", "small"} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_source_and_is_named_as_its_file(name):
    text = (data_folder("conf") / "model" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert preset(name).name == name


def test_the_schema_has_every_fact_of_a_model():
    facts = {fact.name for fact in dataclasses.fields(ModelSpec)}
    assert facts == {key.name for key in dataclasses.fields(ModelConfig)} - {"path", "sequence"}


@pytest.mark.parametrize("name", [*(name for name in PRESETS if name not in ("tiny", "small")), "hf"])
def test_a_published_model_says_the_sequence_of_its_pre_training_and_who_states_it(name):
    text = (data_folder("conf") / "model" / f"{name}.yaml").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("sequence: "))
    value, source = line.removeprefix("sequence: ").split(" # ")
    assert int(value) in (2048, 4096, 8192, 32768)
    assert re.search(r"assumed|arXiv \d{4}\.\d{5}|announcement|model page", source)


LATENT = (
    *("model.attention=mla", "model.kv_heads=4", "model.heads=4", "model.head_dim=32", "model.kv_lora_rank=32"),
    *("model.qk_nope_dim=16", "model.qk_rope_dim=16", "model.v_head_dim=16"),
)
LACKING = {
    "grok_1": "norms_per_layer",
    "phi_3_5_moe": "router_score",
    "glm_4_5": "mtp_layers",
    "llama4_scout": "encoder_parameters",
    "llama4_maverick": "encoder_parameters",
} | {name: "experts" for name in PRESETS if name.startswith(("gpt3", "llama3"))}
"""Presets that do not train as they are, and a fact that the executor says it lacks; all others do."""


def test_any_model_s_shapes_are_measured():
    assert checked("task=microbench", "model=grok_1", "task.suites=[grouped_gemm]").model.name == "grok_1"


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_executor_lacks_of_a_preset_is_named_and_all_others_train(name):
    lacking = LACKING.get(name)
    found = list(missing_of_model(preset(name), "bfloat16"))
    assert bool(found) == (lacking is not None)
    assert lacking is None or f"model.{lacking}" in {problem.key for problem in found}
    assert all("only task=plan models" in problem.rule for problem in found)


@pytest.mark.parametrize("task", ["train", "profile"])
def test_a_model_that_does_not_train_is_refused_before_anything_starts(task):
    with pytest.raises(ConfigError, match=r"model\.norms_per_layer.*the executor lacks"):
        checked(f"task={task}", "model=grok_1")


@pytest.mark.parametrize(
    ("overrides", "key", "works"),
    [
        (["model.mtp_layers=1"], "model.mtp_layers", "model.mtp_layers=0"),
        (["model.positions=64"], "model.positions", "model.positions=0"),
        (["model.norms_per_layer=4"], "model.norms_per_layer", "model.norms_per_layer=2"),
        (["model.router_score=sparsemixer"], "model.router_score", "model.router_score=softmax"),
        (["model.weighted_input=true"], "model.top_k", "model.top_k=1, or model.weighted_input=false"),
        (["model.head_dim=15"], "model.head_dim", "model.head_dim=16"),
        ([*LATENT, "model.attention_sinks=true"], "model.attention_sinks", "model.attention_sinks=false"),
        ([*LATENT, "model.clip_qkv=8.0"], "model.clip_qkv", "model.clip_qkv=0.0"),
        (
            ["model.tied_embeddings=true"],
            "model.tied_embeddings",
            "parallelism.pp=1 parallelism.vpp=1, or false",
        ),
    ],
)
def test_a_fact_that_the_executor_lacks_is_named_with_the_value_it_has(overrides, key, works):
    checked("task=plan", *overrides)
    with pytest.raises(ConfigError) as caught:
        checked("task=train", *overrides)
    (problem,) = caught.value.problems
    assert (problem.key, problem.works) == (key, works)


def test_following_the_advice_a_dense_model_can_be_trained():
    with pytest.raises(ConfigError) as caught:
        checked("model=llama3_8b")
    advice = [word for problem in caught.value.problems for word in problem.works.split()]
    assert checked("model=llama3_8b", *advice).model.experts == 8


def test_a_model_without_a_required_key_says_which():
    with pytest.raises(ConfigError) as caught:
        checked("model.layers=null", "model.vocab=null")
    assert {problem.key for problem in caught.value.problems} == {"model.layers", "model.vocab"}
