"""What a model's facts amount to: parameters by part and layer, windows, and the facts that cannot be."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.spec import ModelSpec, SpecError
from tests.presets import preset

BASE = ModelSpec("base", 6, 64, 8, 2, 16, experts=8, top_k=2, expert_ffn=32, vocab=100)
DENSE = dataclasses.replace(BASE, experts=0, top_k=0, expert_ffn=0, dense_ffn=96)
MLA = dataclasses.replace(
    BASE, attention="mla", kv_heads=8, head_dim=24, kv_lora_rank=32, qk_nope_dim=16, qk_rope_dim=8, v_head_dim=12
)


def test_grouped_attention_and_experts_by_hand():
    assert BASE.attention_parameters == 64 * 128 + 2 * 64 * 32 + 128 * 64
    assert BASE.expert_parameters == 3 * 64 * 32
    layer = BASE.layer_parameters_of(0)
    assert (layer.router, layer.norms, layer.experts, layer.ffn) == (64 * 8, 128, 8 * 3 * 64 * 32, 0)
    assert layer.replicated == layer.total - layer.experts
    assert BASE.parameters == 6 * layer.total + 2 * 100 * 64 + 64


def test_mla_by_hand():
    query, latent = 64 * 8 * 24, 64 * (32 + 8)
    keys_and_values, output = 32 * 8 * (16 + 12), 8 * 12 * 64
    assert MLA.attention_weights == query + latent + keys_and_values + output
    assert MLA.attention_parameters == MLA.attention_weights + 32  # the norm of the latent
    low_rank = dataclasses.replace(MLA, q_lora_rank=40)
    assert low_rank.attention_weights - MLA.attention_weights == 40 * (64 + 8 * 24) - query
    assert (MLA.q_dim, MLA.v_dim) == (192, 96)


@pytest.mark.parametrize(
    ("facts", "more"),
    [
        ({"attention_bias": True}, 6 * (128 + 2 * 32)),
        ({"output_bias": True}, 6 * 64),
        ({"qk_norm": "head"}, 6 * 2 * 16),
        ({"qk_norm": "full"}, 6 * (128 + 32)),
        ({"qk_norm": "l2"}, 0),
        ({"attention_sinks": True}, 6 * 8),
        ({"ffn_bias": True}, 6 * 8 * (2 * 32 + 64)),
        ({"router_bias": True}, 6 * 8),
        ({"head_bias": True}, 100),
        ({"tied_embeddings": True}, -100 * 64),
        ({"positions": 50}, 50 * 64),
        ({"norm": "layer"}, 13 * 64),
        ({"norm": "layer_no_bias"}, 0),
        ({"norms_per_layer": 4}, 6 * 2 * 64),
        ({"shared_experts": 2, "shared_expert_ffn": 40}, 6 * 3 * 64 * 80),
        ({"shared_experts": 1, "shared_expert_ffn": 40, "shared_expert_gate": True}, 6 * (3 * 64 * 40 + 64)),
        ({"dense_residual_ffn": 48}, 6 * 3 * 64 * 48),
        ({"mtp_layers": 1}, BASE.layer_parameters + 2 * 64 * 64 + 3 * 64),
        ({"encoder_parameters": 1000}, 1000),
        ({"dense_first": 1, "dense_ffn": 96}, 3 * 64 * 96 - BASE.router_parameters - 8 * 3 * 64 * 32),
        ({"sliding_window": 16}, 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_each_fact_adds_exactly_its_parameters(facts, more):
    assert dataclasses.replace(BASE, **facts).parameters == BASE.parameters + more


def test_a_dense_model_has_neither_router_nor_experts():
    layer = DENSE.layer_parameters_of(3)
    assert (layer.ffn, layer.router, layer.experts) == (3 * 64 * 96, 0, 0)
    assert DENSE.active_parameters == DENSE.parameters
    assert (DENSE.moe_layers, DENSE.dense_layers) == (0, 6)


def test_which_layers_have_experts():
    leading = dataclasses.replace(BASE, dense_first=2, dense_ffn=96)
    assert [leading.is_moe(layer) for layer in range(6)] == [False, False, True, True, True, True]
    alternating = dataclasses.replace(BASE, moe_every=2, dense_ffn=96)
    assert [alternating.is_moe(layer) for layer in range(6)] == [False, True] * 3
    assert (alternating.moe_layers, alternating.dense_layers) == (3, 3)


def test_every_nth_layer_sees_all():
    assert dataclasses.replace(BASE, sliding_window=16, full_attention_every=3).windows == (16, 16, 0, 16, 16, 0)
    assert dataclasses.replace(BASE, sliding_window=16).windows == (16,) * 6
    assert BASE.windows == (0,) * 6


@given(
    experts=st.integers(1, 64),
    top_k=st.integers(1, 64),
    first=st.integers(0, 5),
    every=st.integers(1, 4),
    shared=st.integers(0, 2),
    mtp=st.integers(0, 2),
)
def test_parts_add_up_and_active_is_part_of_all(experts, top_k, first, every, shared, mtp):
    facts = {"experts": experts, "top_k": min(top_k, experts), "dense_first": first, "mtp_layers": mtp}
    facts |= {"moe_every": min(every, 6 - first), "dense_ffn": 96, "shared_experts": shared}
    spec = dataclasses.replace(BASE, **facts, shared_expert_ffn=32 if shared else 0)
    assert spec.moe_layers == sum(spec.is_moe(layer) for layer in range(spec.layers))
    layers = sum(spec.layer_parameters_of(layer).total for layer in range(spec.layers))
    outside = spec.embedding_parameters + spec.head_parameters + spec.norm_width + spec.mtp_parameters
    assert spec.parameters == layers + outside
    assert 0 < spec.active_parameters <= spec.parameters
    assert (spec.active_parameters == spec.parameters) == (spec.top_k == experts)
    more = dataclasses.replace(spec, experts=experts + 1)
    assert more.parameters > spec.parameters
    # Another expert that is not chosen costs a token its row of the router.
    assert more.active_parameters - spec.active_parameters == spec.hidden * (spec.moe_layers + mtp)


@pytest.mark.parametrize(
    ("facts", "key", "words", "works"),
    [
        ({"layers": 0}, "model.layers", "greater than 0", "model.layers=1"),
        ({"experts": -1}, "model.experts", "not be negative", "model.experts=0"),
        ({"norm": "batch"}, "model.norm", "one of rms, layer, layer_no_bias", "model.norm=rms"),
        ({"kv_heads": 3}, "model.kv_heads", "divide model.heads = 8", "model.kv_heads=8"),
        ({"kv_lora_rank": 8}, "model.kv_lora_rank", "mla", "model.kv_lora_rank=0"),
        ({"top_k": 9}, "model.top_k", "more than model.experts = 8", "model.top_k=8"),
        ({"top_k": 0}, "model.top_k", "greater than 0", "model.top_k=1"),
        ({"dense_first": 7}, "model.dense_first", "at most model.layers = 6", "model.dense_first=5"),
        ({"dense_first": 2}, "model.dense_ffn", "2 dense feed-forwards", "model.dense_ffn=256"),
        ({"moe_every": 7, "dense_ffn": 9}, "model.moe_every", "none of the 6 layers", "model.moe_every=1"),
        ({"experts": 0, "dense_ffn": 9}, "model.top_k", "dense model", "model.top_k=0"),
        ({"shared_experts": 1}, "model.shared_expert_ffn", "width", "model.shared_expert_ffn=32"),
        ({"shared_expert_gate": True}, "model.shared_expert_gate", "shared_experts", "model.shared_expert_gate=false"),
        ({"full_attention_every": 2}, "model.full_attention_every", "sliding_window", "model.full_attention_every=0"),
        ({"expert_groups": 3}, "model.expert_groups", "divide model.experts = 8", "model.expert_groups=1"),
        ({"expert_groups": 8, "groups_per_token": 1}, "model.groups_per_token", "top_k = 2", "groups_per_token=8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_facts_that_cannot_be_are_named_with_a_value_that_works(facts, key, words, works):
    with pytest.raises(SpecError) as caught:
        dataclasses.replace(BASE, **facts)
    problem = next(each for each in caught.value.problems if each.key == key)
    assert words in problem.rule and works in problem.works
    assert follow_the_advice(facts).name == "base"


def follow_the_advice(facts: dict[str, object]) -> ModelSpec:
    for _ in range(4):
        try:
            return dataclasses.replace(BASE, **facts)
        except SpecError as error:
            for problem in error.problems:
                key, value = problem.works.removeprefix("model.").split("=")
                facts = facts | {key: int(value) if value.isdigit() else {"false": False}.get(value, value)}
    raise AssertionError(f"still broken after following the advice: {facts}")


def test_mla_needs_its_widths_to_agree():
    with pytest.raises(SpecError, match=r"head_dim = 20.*qk_nope_dim \+ qk_rope_dim = 24"):
        dataclasses.replace(MLA, head_dim=20)


@pytest.mark.parametrize(
    "name",
    [*(f"xmoe_{size}" for size in ("small", "medium", "large", "super")), *(f"m10b_e{2**n}" for n in range(4, 9))],
)
def test_the_papers_two_matrix_models_are_reported_as_the_papers_count_them(name):
    """arXiv 2605.05049 Fig 14, arXiv 2508.13337. The figures are cases of analysis.validation.exact."""
    spec = preset(name)
    counted = spec.paper_parameters
    assert (spec.reported_parameters, spec.reported_active_parameters) == (counted, spec.paper_active_parameters)
    # What is left out there, and is kept in memory all the same: router, norms, embedding and head.
    assert 0 < spec.parameters - counted < 0.02 * counted


def test_more_experts_leave_what_a_token_meets_as_it_is():
    """arXiv 2605.05049 Fig 14: 32 (2 * 2 * 5120 * 20480 + 4 * 5120^2)."""
    assert {preset(f"m10b_e{2**n}").reported_active_parameters for n in range(4, 9)} == {16_777_216_000}


@pytest.mark.parametrize("name", ["mixtral_8x7b", "mixtral_8x22b_l60"])
def test_released_models_are_reported_whole(name):
    assert preset(name).reported_parameters == preset(name).parameters
