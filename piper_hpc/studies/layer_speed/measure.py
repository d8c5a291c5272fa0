"""Forward and backward of our layer, of transformers' and of a dense product, timed in turn on one device."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from piper_hpc.comm import FlatDispatcher
from piper_hpc.model.layer import LayerSettings, MoELayer
from piper_hpc.model.names import initialise
from piper_hpc.profiling.clock import clock_for
from piper_hpc.profiling.untimed import UntimedRecorder
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.recompute import Recompute
from piper_hpc.studies.layer_speed.points import HEAD_DIM, HEADS, Shape, Timed

Call = Callable[[], None]
LEAST_CALLS, MOST_CALLS = 5, 50
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm")


def time_shape(
    shape: Shape, dtype: str, part: str, device: torch.device, budget_s: float, *, profiled: bool = False
) -> Timed:
    """Medians over calls in turn; profiled: afterwards also the share of matrix products in each layer's time. Raises
    AssertionError where both layers do not compute the same."""
    type_ = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.tokens, shape.hidden, generator=generator).view(-1, shape.sequence, shape.hidden)
    hidden = hidden.to(device, type_)
    ours, theirs = our_layer(shape, device, type_), their_layer(shape, device, type_)
    copy_weights(ours, theirs)
    forwards: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    if part == "experts":
        forwards = {"ours": lambda h: experts_of(ours, h), "theirs": theirs.mlp}
    else:
        positions = torch.arange(shape.sequence, device=device)[None]
        rotary = rotary_of(shape, device, type_)(hidden, positions)
        forwards = {"ours": ours, "theirs": lambda h: theirs(h, position_embeddings=rotary)}
    with torch.no_grad():
        found, expected = (forward(hidden) for forward in forwards.values())
    tolerance = 1e-4 if type_ == torch.float32 else 5e-2
    assert (found - expected).abs().max() <= tolerance * expected.abs().max(), f"{shape}: the layers differ"
    calls = {name: forward_and_backward(forward, hidden) for name, forward in forwards.items()}
    calls["dense"] = dense_product(shape, device, type_)
    medians = in_turn(calls, device, budget_s)
    shares = [products_share(calls[name], device) for name in ("ours", "theirs")] if profiled else [None, None]
    return Timed(shape, dtype, part, medians["ours"], medians["theirs"], medians["dense"], *shares)


def our_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """One layer with all experts here."""
    spec, placement = shape.spec, ExpertPlacement.linear(shape.experts, 1)
    recorder = UntimedRecorder(clock_for(device))
    settings = LayerSettings(shape.sequence, 0.0, FlatDispatcher(), recorder, Recompute(), device, dtype)
    layer = MoELayer(spec, 0, settings, placement)
    named = torch.nn.ModuleDict({"layers": torch.nn.ModuleDict({"0": layer})})
    initialise(named, [range(shape.experts)], layers=1, seed=0)
    return layer


def their_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Qwen3-MoE's layer of `transformers` with its grouped product and fused attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_of(shape), experts_implementation="grouped_mm")
    return model.model.layers[0].to(device, dtype)


def config_of(shape: Shape) -> Any:
    """The same facts for `transformers`."""
    from transformers import Qwen3MoeConfig

    facts: dict[str, Any] = {
        **{"hidden_size": shape.hidden, "num_hidden_layers": 1, "vocab_size": 64, "rms_norm_eps": 1e-5},
        **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM, "rope_theta": 1e6},
        **{"moe_intermediate_size": shape.expert_ffn, "num_experts": shape.experts},
        **{"num_experts_per_tok": shape.top_k, "norm_topk_prob": True, "attn_implementation": "sdpa"},
    }
    return Qwen3MoeConfig(**facts)


def rotary_of(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Its rotary tables."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    return Qwen3MoeRotaryEmbedding(config_of(shape)).to(device)


@torch.no_grad()
def copy_weights(ours: MoELayer, theirs: Any) -> None:
    """Give their layer our weights."""
    attention, experts = theirs.self_attn, theirs.mlp.experts
    for name in "qkvo":
        getattr(attention, f"{name}_proj").weight.copy_(getattr(ours.attention, name).weight)
    theirs.mlp.gate.weight.copy_(ours.router.gate.weight)
    assert ours.experts.w3 is not None
    both = torch.cat((ours.experts.w1, ours.experts.w3), dim=-1)
    experts.gate_up_proj.copy_(both.transpose(1, 2))
    experts.down_proj.copy_(ours.experts.w2.transpose(1, 2))


def experts_of(layer: MoELayer, hidden: torch.Tensor) -> torch.Tensor:
    """The MoE part alone: router, dispatch, experts, combine."""
    routed, tokens = layer.router(hidden), hidden.flatten(0, 1)
    begun, handle = layer.dispatcher.dispatch(tokens, routed.expert_ids, routed.weights, layer.placement)
    return layer.dispatcher.combine(layer.experts(handle.rows(begun), handle.offsets), handle).view_as(hidden)


def forward_and_backward(forward: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> Call:
    """One call, with gradients of input and weights."""
    given, gradient = hidden.clone().requires_grad_(), torch.randn_like(hidden)

    def call() -> None:
        forward(given).backward(gradient)
        given.grad = None

    return call


def dense_product(shape: Shape, device: torch.device, dtype: torch.dtype) -> Call:
    """Forward and backward of one product with the experts' FLOPs: [tokens k, d] x [d, 3 f]."""
    rows = torch.randn(shape.tokens * shape.top_k, shape.hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape.hidden, 3 * shape.expert_ffn, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows.shape[0], weight.shape[1], device=device, dtype=dtype)

    def call() -> None:
        (rows @ weight).backward(gradient)

    return call


def products_share(call: Call, device: torch.device) -> float:
    """Of the seconds of a call, those in matrix products, single or grouped; by torch's profiler over some calls."""
    on_device = device.type != "cpu"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_device]
    with profile(activities=activities) as profiled:
        for _ in range(LEAST_CALLS):
            call()
    seconds = {
        event.key: event.self_device_time_total if on_device else event.self_cpu_time_total
        for event in profiled.key_averages()
    }
    return sum(seconds.get(name, 0.0) for name in PRODUCTS) / sum(seconds.values())


def in_turn(calls: dict[str, Call], device: torch.device, budget_s: float) -> dict[str, float]:
    """Median seconds of each, one call of each after the other, until the budget is spent."""
    clock = clock_for(device)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # the first call allocates
        call()
    spent = 0.0
    while len(seconds["ours"]) < LEAST_CALLS or (spent < budget_s and len(seconds["ours"]) < MOST_CALLS):
        for name, call in calls.items():
            clock.start()
            begin = clock.now()
            call()
            end = clock.now()
            clock.finish()
            took = clock.seconds(end) - clock.seconds(begin)
            seconds[name].append(took)
            spent += took
    return {name: statistics.median(found) for name, found in seconds.items()}
