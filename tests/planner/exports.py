"""Choices to export: a layout with a made-up prediction, and every layout that the rules allow of a model."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import assume
from hypothesis import strategies as st

from piper_hpc.planner.export.choice import Choice
from piper_hpc.spec import ALGORITHMS, EXECUTIONS, RECIPES, Layout, ModelSpec, Prediction, Routing, Workload
from piper_hpc.spec.rules import layout_problems
from piper_hpc.spec.schedules import SCHEDULES, V_SHAPED
from tests.planner.machines import DENSE, MOE
from tests.presets import preset

MODELS = ("mixtral_8x7b", "qwen2_57b_a14b", "qwen3_30b_a3b", "deepseek_v3", "llama4_maverick", "llama3_8b", "gpt3_22b")
RECOMPUTE = ("none", "full", "norm", "activation", "attention", "moe", "norm+activation", "activation+moe")


def choice(model: ModelSpec, layout: Layout, workload: Workload, executor: str = "megatron") -> Choice:
    """The layout as the best of a plan that predicts round figures."""
    best = Prediction(layout, 2.5, 400_000.0, 0.4, [50 * 2**30], 0.1, {}, {}, {}, {}, {}, {})
    return Choice(model, workload, best, EXECUTIONS[executor], "dgx_h100", 80 * 2**30)


def powers(most: int) -> st.SearchStrategy[int]:
    """1, 2, 4, ... 2^most."""
    return st.integers(0, most).map(lambda power: 2**power)


@st.composite
def choices(
    draw: st.DrawFn,
    *,
    schedules: tuple[str, ...] = SCHEDULES,
    recompute: tuple[str, ...] = RECOMPUTE,
    recipes: tuple[str, ...] = tuple(RECIPES),
) -> Choice:
    """Layouts that break no rule, in the names that a file keeps: nothing that is another name of the same."""
    model = draw(st.sampled_from([MOE, DENSE, *map(preset, MODELS)]))
    pp, tp, cp, dense_dp = draw(powers(3)), draw(powers(2)), draw(powers(2)), draw(powers(3))
    stage_ranks = tp * cp * dense_dp
    ep, etp = (draw(powers(4)), draw(powers(2))) if model.experts else (1, 1)
    assume(stage_ranks % (ep * etp) == 0)
    schedule = draw(st.sampled_from(schedules)) if pp > 1 else "1f1b"
    vpp = 2 if schedule in V_SHAPED else draw(st.sampled_from((2, 3))) if schedule == "interleaved" else 1
    dp = stage_ranks // (ep * etp)
    shards = dense_dp * cp > 1 or dp > 1
    again = draw(st.sampled_from(recompute))
    assume(model.experts or "moe" not in again)
    assume(model.dense_layers or again != "activation+moe")
    micro_batch = draw(st.sampled_from((1, 2, 3)))
    layout = Layout(
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        tp=tp,
        cp=cp,
        dp=dp,
        zero=draw(st.integers(0, 3)) if shards else 0,
        schedule=schedule,
        micro_batch=micro_batch,
        recompute=again,
        all_to_all=draw(st.sampled_from(list(ALGORITHMS))),
        placement=draw(st.sampled_from(("linear", "strided"))),
    )
    if model.layers > layout.stages > 1 and draw(st.booleans()):
        even = [len(layers) for layers in layout.layers_by_stage(model.layers)]
        assume(even[-1] > 1)
        layout = replace(layout, stage_layers=(even[0] + 1, *even[1:-1], even[-1] - 1))
    micro_batches = pp * draw(st.integers(1, 4))
    modes = (Routing(), Routing("forced"), Routing("drop", 1.25))
    routing = draw(st.sampled_from(modes)) if model.experts else Routing()
    recipe = RECIPES[draw(st.sampled_from(recipes))]
    workload = Workload(micro_batch * dense_dp * micro_batches, 4096, recipe, routing)
    assume(not list(layout_problems(model, layout, workload)))
    return choice(model, layout, workload)
