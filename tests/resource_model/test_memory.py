"""Memory by stage: its monotonicity, and its agreement with what the training step really keeps alive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.comm import FlatDispatcher
from piper_hpc.model import Stage
from piper_hpc.model.names import initialise
from piper_hpc.parallel.groups import make_groups
from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.parallel.pipeline import Pipeline
from piper_hpc.profiling.clock import clock_for
from piper_hpc.profiling.memory import LiveBytes
from piper_hpc.profiling.spans import Recorder
from piper_hpc.resource_model.eager.memory import (
    head_activation_bytes,
    layer_activation_bytes,
    memory_by_rank,
    peak_bytes,
    split_activation_bytes,
)
from piper_hpc.resource_model.eager.pipeline import Held
from piper_hpc.resource_model.schedule import rank_order
from piper_hpc.spec import RECIPES, TRAINED, LayerKind, Layout, ModelSpec, RankMap, Workload
from piper_hpc.spec.executor import SENDS_UNDER_WAY
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.orders import Action
from piper_hpc.spec.schedules import stage_of
from piper_hpc.train.optimizer import Optimizer
from piper_hpc.train.settings import TrainSettings
from tests.full import full
from tests.peak import peak_tensor_bytes
from tests.resource_model.clusters import TINY, WIDE

WORKLOAD = Workload(global_batch=64, sequence=128)


@given(
    st.sampled_from([TINY, WIDE]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["micro_batch", "sequence", "hidden", "expert_ffn", "layers", "vocab", "bytes"]),
)
def test_more_of_anything_never_needs_less_memory(model: ModelSpec, pp: int, ep: int, what: str) -> None:
    layout, workload = Layout(pp=pp, ep=ep, micro_batch=2), WORKLOAD
    before = peak_bytes(model, layout, workload)
    if what == "micro_batch":
        layout = replace(layout, micro_batch=4)
    elif what == "sequence":
        workload = replace(workload, sequence=256)
    elif what == "bytes":
        workload = replace(workload, recipe=RECIPES["float64"])
    else:
        model = replace(model, **{what: 2 * getattr(model, what)})
    assert all(after >= size for size, after in zip(before, peak_bytes(model, layout, workload), strict=True))


def test_earlier_stages_keep_more_micro_batches_alive() -> None:
    deep = replace(TINY, layers=8)
    memory = memory_by_rank(deep, Layout(pp=4, micro_batch=2), WORKLOAD)
    assert all(earlier > later for earlier, later in pairwise(memory["activations"][:3]))


def test_experts_are_divided_by_ep_and_nothing_else_is() -> None:
    whole, halved = (sum(stage_parameters(TINY, Layout(ep=ep))) for ep in (1, 2))
    assert whole == TINY.parameters
    assert whole - halved == TINY.layers * TINY.experts // 2 * TINY.expert_parameters


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_stages_hold_every_parameter_once(pp: int) -> None:
    assert sum(stage_parameters(TINY, Layout(pp=pp))) == TINY.parameters


def kinds(layout: Layout, workload: Workload = WORKLOAD, model: ModelSpec = TINY) -> dict[str, list[int]]:
    return memory_by_rank(model, layout, workload)


def stage_parameters(model: ModelSpec, layout: Layout) -> list[int]:
    """Parameters of one rank, by pipeline rank, in float32."""
    return [held // 4 for held in kinds(layout, model=model)["parameters"]]


def test_zero_1_shards_the_optimizer_and_keeps_its_part_of_master_and_gradient_apart() -> None:
    """Dense parameters over all four ranks of the stage, experts over the two that hold the same; fp32 and bf16."""
    layout = Layout(ep=2, dp=2)
    experts = TINY.layers * TINY.experts // 2 * TINY.expert_parameters
    dense = stage_parameters(TINY, layout)[0] - experts
    for recipe, whole, sharded in (("float32", 8, 16), ("mixed_18", 12, 16)):
        workload = replace(WORKLOAD, recipe=RECIPES[recipe])
        assert kinds(layout, workload)["optimizer"] == [whole * (dense + experts)]
        assert kinds(replace(layout, zero=1), workload)["optimizer"] == [sharded * (dense // 4 + experts // 2)]
    alone = Layout(ep=4, zero=1)  # an expert without a copy has nothing to share
    own = TINY.layers * TINY.experts // 4 * TINY.expert_parameters
    assert kinds(alone)["optimizer"] == [16 * (stage_parameters(TINY, alone)[0] - own) // 4 + 8 * own]
    mixed = kinds(layout, replace(WORKLOAD, recipe=TRAINED["bfloat16"]))
    assert (mixed["parameters"], mixed["gradients"]) == ([2 * (dense + experts)], [4 * (dense + experts)])


def test_the_shards_that_zero_1_receives_may_be_the_peak() -> None:
    """One sequence of two tokens keeps next to nothing; slices of all gradients leave, and as many come."""
    short = Workload(global_batch=2, sequence=2)
    plain, sharded = (kinds(Layout(dp=2, zero=zero), short) for zero in (0, 1))
    assert sharded["activations"] == plain["activations"]
    assert sharded["activations"][0] + sharded["workspace"][0] == 2 * 4 * TINY.parameters
    assert kinds(Layout(zero=1), short)["workspace"] == kinds(Layout(), short)["workspace"]  # alone, nothing comes


def test_what_is_recomputed_is_not_kept() -> None:
    """Two micro-batches are alive on the first of two ranks, each of two layers of 256 tokens in two experts."""
    layout, tokens = Layout(pp=2, micro_batch=2), 256

    def activations(recompute: str) -> int:
        return kinds(replace(layout, recompute=recompute))["activations"][0]

    output = tokens * (TINY.q_dim + TINY.heads) * 4
    inner = 2 * tokens * TINY.top_k * TINY.expert_ffn * 4
    assert activations("none") - activations("selective") == 2 * 2 * output
    assert activations("none") - activations("activation") == 2 * 2 * inner
    assert activations("none") - activations("attention+activation") == 2 * 2 * (output + inner)
    hidden = tokens * TINY.hidden * 4
    assert activations("full") == 2 * (2 * hidden + hidden)  # each layer's input, and what the stage returned
    workspace = [kinds(replace(layout, recompute=name))["workspace"][0] for name in ("none", "activation", "full")]
    layer = layer_activation_bytes(TINY, tokens, 1, 4)
    assert [workspace[1] - workspace[0], workspace[2] - workspace[0]] == [inner, layer - hidden]


def test_a_rank_keeps_what_the_order_of_its_schedule_keeps() -> None:
    """Chunks of different sizes, whose most does not come when most of them are alive."""
    deep = replace(TINY, layers=8)
    for schedule, split in (("zbv", (1, 2, 3, 2)), ("dualpipev", (1, 1, 1, 5)), ("interleaved", (3, 2, 2, 1))):
        layout = Layout(pp=2, vpp=2, schedule=schedule, micro_batch=2, stage_layers=split)
        memory, micro_batches = kinds(layout, WORKLOAD, deep), layout.micro_batches(WORKLOAD.global_batch)
        layer, head = layer_activation_bytes(deep, 256, 1, 4), head_activation_bytes(deep, 256, 4)
        message, logits = 256 * deep.hidden * 4, 256 * deep.vocab * 4
        # The first stage got no message; the last keeps the head's and its logits; the others return what they got,
        # but for the turn of a V, where what is returned lies in a buffer.
        kept = [split[0] * layer + message, split[1] * layer, split[2] * layer, split[3] * layer + head + logits]
        kept[3] -= message
        kept[1] -= (schedule != "interleaved") * message
        left = [
            split_activation_bytes(deep, 256, 4, chunk=Held(((LayerKind(), layers),), False, stage == 3))
            if stage
            else 0
            for stage, layers in enumerate(split)
        ]
        for rank in (0, 1):
            stages = [stage_of(schedule, rank, chunk, 2) for chunk in (0, 1)]
            order = rank_order(schedule, rank, 2, 2, micro_batches)
            assert memory["activations"][rank] == most_held(order, stages, kept, left)


def most_held(order: Iterable[Action], stages: list[int], kept: list[int], left: list[int]) -> int:
    """The most bytes after any action; kept: of each stage from F to B or W, left: from I to W."""
    held = most = 0
    for part in (part for action in order for part in action.parts):
        stage = stages[part.chunk]
        held += {"F": kept[stage], "B": -kept[stage], "I": left[stage], "W": -kept[stage] - left[stage]}[part.kind]
        most = max(most, held)
    return most


def test_messages_are_of_neighbours_on_other_ranks() -> None:
    deep, message = replace(TINY, layers=8), 2 * 128 * TINY.hidden * 4

    def messages(schedule: str, vpp: int) -> list[float]:
        layout = Layout(pp=2, vpp=vpp, micro_batch=2, schedule=schedule)
        return [bytes_ / message for bytes_ in kinds(layout, WORKLOAD, deep)["messages"]]

    assert messages("1f1b", 1) == [32 + SENDS_UNDER_WAY] * 2
    assert messages("interleaved", 2) == [3 * 32 + SENDS_UNDER_WAY] * 2
    # The turn of the V is inside the last rank, which passes on to itself and back.
    assert messages("zbv", 2) == [2 * 32 + SENDS_UNDER_WAY, 4 * 32 + SENDS_UNDER_WAY]


def test_the_loss_of_a_bf16_run_has_four_bytes_a_number() -> None:
    tokens, mixed = 256, replace(WORKLOAD, recipe=TRAINED["bfloat16"])
    probabilities = tokens * TINY.vocab * 4
    norm = (2 * TINY.hidden + 1) * 4 + TINY.hidden * 2  # in bf16 a norm keeps its input and the normalised row wide
    assert head_activation_bytes(TINY, tokens, 2) == tokens * norm + probabilities
    wide = replace(TINY, vocab=2**15)
    assert kinds(Layout(micro_batch=2), mixed, wide)["workspace"] == [2 * tokens * 2**15 * 4]


@pytest.mark.parametrize("vpp", [1, 2])
def test_layers_may_lie_unevenly(vpp: int) -> None:
    deep = replace(TINY, layers=8)
    schedule = "interleaved" if vpp == 2 else "1f1b"
    even = Layout(pp=2, vpp=vpp, schedule=schedule)
    uneven = replace(even, stage_layers=(5, 3) if vpp == 1 else (3, 2, 2, 1))
    moved = stage_parameters(deep, Layout(pp=8))[1]  # one layer
    before, after = (stage_parameters(deep, layout) for layout in (even, uneven))
    assert [after[0] - before[0], before[1] - after[1]] == [moved, moved]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "micro_batch", "sequence"),
    [
        (TINY, 4, 64),
        (replace(TINY, layers=2, top_k=4, expert_ffn=512, matrices_per_expert=2), 2, 128),
        (replace(TINY, layers=2, hidden=64, head_dim=16, vocab=2048, top_k=1), 4, 128),
        (replace(TINY, layers=2, experts=16, expert_ffn=512, kv_heads=4), 1, 64),
    ],
    ids=["tiny", "two matrices", "large vocabulary", "large experts"],
)
def test_peak_of_a_real_step_on_one_rank(model: ModelSpec, micro_batch: int, sequence: int) -> None:
    layout, workload = Layout(micro_batch=micro_batch), Workload(2 * micro_batch, sequence)
    measured = measured_peak(model, layout, workload)
    assert peak_bytes(model, layout, workload)[0] == pytest.approx(measured, rel=2e-3)


KINDS = ModelSpec(
    "kinds", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, experts=4, top_k=2, expert_ffn=64, vocab=128
)
LATENT = replace(
    KINDS, attention="mla", kv_heads=4, head_dim=24, qk_nope_dim=16, qk_rope_dim=8, v_head_dim=16, kv_lora_rank=32
)
PARTS = {
    "qk norm of a head, biases": {"qk_norm": "head", "attention_bias": True, "output_bias": True},
    "qk norm of all heads, clipped": {"qk_norm": "full", "clip_qkv": 1.0},
    "qk norm without parameters, chunks, no positions": {
        **{"qk_norm": "l2", "sliding_window": 40, "window_kind": "chunked", "full_attention_every": 4},
        **{"nope_every": 4, "temperature_floor": 8, "router_score": "sigmoid", "top_k": 1, "weighted_input": True},
    },
    "windows and sinks, biases, clamps": {
        **{"attention_sinks": True, "sliding_window": 40, "full_attention_every": 2, "swiglu_limit": 7.0},
        **{"ffn_bias": True, "router_bias": True, "attention_bias": True, "output_bias": True},
    },
    "shared experts with a gate": {"shared_experts": 2, "shared_expert_ffn": 48, "shared_expert_gate": True},
    "dense layers first, z-loss": {"dense_first": 2, "dense_ffn": 192, "router_z_coef": 0.1},
    "dense layers between, tied": {"moe_every": 2, "dense_ffn": 192, "tied_embeddings": True},
    "a dense residual": {"dense_residual_ffn": 64, "norms_per_layer": 3},
    "layer norms, weights as they are": {"norm": "layer", "normalised_weights": False},
    "half a head turned": {"rope_fraction": 0.5, "router_aux": "global_batch"},
}


EVERY_PART = ["plain", *PARTS, "latent", "latent, low-rank query, groups"]
TYPES = ("float32", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        pytest.param(part, dtype, marks=[] if TYPES[number % 2] == dtype else full)
        for number, part in enumerate(EVERY_PART)
        for dtype in TYPES
    ],
)
def test_peak_of_a_real_step_of_every_part_of_a_model(part: str, dtype: str) -> None:
    if part == "plain" or part in PARTS:
        model = replace(KINDS, **PARTS.get(part, {}))
    elif part == "latent":
        model = LATENT
    else:
        groups = {"expert_groups": 2, "groups_per_token": 1, "selection_bias": True, "router_score": "sigmoid"}
        model = replace(LATENT, q_lora_rank=40, shared_experts=1, shared_expert_ffn=64, **groups)
    layout, workload = Layout(micro_batch=4), Workload(8, 64, recipe=TRAINED[dtype])
    measured = measured_peak(model, layout, workload, dtype)
    assert peak_bytes(model, layout, workload)[0] == pytest.approx(measured, rel=5e-3)


def measured_peak(model: ModelSpec, layout: Layout, workload: Workload, type_: str = "float32") -> int:
    """Peak of live tensor bytes of the second optimizer step on one rank, without those that other tests keep."""
    with LiveBytes() as others:
        pass
    device, dtype = torch.device("cpu"), getattr(torch, type_)
    recorder = Recorder(clock_for(device))
    groups = make_groups(RankMap.block(layout, 1, (0,)), timedelta(seconds=10))
    stage = Stage(
        model,
        range(model.layers),
        sequence=workload.sequence,
        aux_scale=0.01,
        dispatcher=FlatDispatcher(None),
        placements=[ExpertPlacement.linear(model.experts, 1)] * model.layers,
        recorder=recorder,
        recompute=layout.recomputed,
        device=device,
        dtype=dtype,
    )
    store = ParameterStore([stage], groups, layout, [range(model.experts)] * model.layers)
    optimizer = Optimizer(store.buckets, TrainSettings(steps=2, dtype=type_))
    pipeline = Pipeline(
        [stage],
        model=model,
        layout=layout,
        workload=workload,
        groups=groups,
        recorder=recorder,
        device=device,
        dtype=dtype,
        on_gradients=store.start_reduction,
    )
    tokens = torch.randint(model.vocab, (workload.global_batch, workload.sequence + 1))
    initialise(stage, [range(model.experts)] * model.layers, layers=model.layers, seed=0)

    def step() -> None:
        recorder.start()
        store.zero()
        pipeline.step(tokens)
        store.finish_reduction()
        store.clip(float(store.squared_norm().total) ** 0.5, 1.0)
        optimizer.step(1e-3)
        store.publish()
        recorder.finish()

    step()
    return peak_tensor_bytes(step) - others.live_bytes
