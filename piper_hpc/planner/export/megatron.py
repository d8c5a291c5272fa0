"""A layout as Megatron-LM's arguments: a shell array, one argument a line. Version and names: `vocabulary.MEGATRON`."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace

from piper_hpc.planner.export import megatron_model
from piper_hpc.planner.export.choice import Choice, Reading, Written, plain, said_workload, shards, speed_notes
from piper_hpc.planner.export.megatron_model import Arguments
from piper_hpc.planner.export.vocabulary import MEGATRON
from piper_hpc.spec import Layout, ModelSpec, Problem, SpecError

ARRAY = "MEGATRON_ARGS"

SCHEDULES = ("1f1b", "interleaved")

SHARDED = {2: "optim_grads", 3: "optim_grads_params"}
"""--data-parallel-sharding-strategy by ZeRO stage; stage 1 is the distributed optimizer's."""

RECIPES: dict[str, Arguments] = {
    "float32": {},
    "mixed_18": {"bf16": True},
    "mixed_16": {"bf16": True, "grad-reduce-in-bf16": True},
    # Tensorwise: delayed scaling, the default, excludes recomputing norms and activations.
    "fp8_mixed": {"bf16": True, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"},
    "fp8_deepseek": {
        "bf16": True,
        "fp8-format": "e4m3",
        "fp8-recipe": "blockwise",
        "fp8-param-gather": True,
        "use-precision-aware-optimizer": True,
        "exp-avg-dtype": "bf16",
        "exp-avg-sq-dtype": "bf16",
    },
}
"""Arguments that keep the bytes of a recipe."""

MODULES = {
    "attention": "core_attn",
    "norm": "layernorm",
    "activation": "moe_act",
    "mla_up": "mla_up_proj",
    "moe": "moe",
}
"""--recompute-modules by part of `recompute`."""


def write(choice: Choice) -> Written:
    """SpecError names everything that Megatron-LM cannot say, each with an override that a plan can take."""
    if problems := [*_problems(choice), *megatron_model.problems(choice.model)]:
        raise SpecError(*problems)
    says = Reading(_said(choice.layout, choice.model), said_workload(choice))
    sections = {
        "the model": megatron_model.arguments(choice.model, choice.workload.sequence),
        "batch": {
            "seq-length": choice.workload.sequence,
            "micro-batch-size": says.layout.micro_batch,
            "global-batch-size": choice.workload.global_batch,
        },
        "parallelism": _parallelism(choice, says.layout),
        "routing": _routing(choice),
        "precision and recomputation": _precision(choice) | _recompute(choice.model, says.layout),
    }
    head = choice.head(MEGATRON, _usage(choice), _notes(choice))
    return Written(head + _array(sections), says)


def _said(layout: Layout, model: ModelSpec) -> Layout:
    said = plain(layout, model)
    # With nothing to shard, higher stages are names of the first.
    return said if shards(layout) else replace(said, zero=min(said.zero, 1))


def _array(sections: dict[str, Arguments]) -> str:
    """A bash array with a comment before each section."""
    lines = []
    for section, arguments in sections.items():
        if arguments:
            lines.append(f"    # {section}")
        for name, value in arguments.items():
            MEGATRON.check(name, value)
            words = [] if value is True else value if isinstance(value, list) else [str(value)]
            lines.append("    " + " ".join([f"--{name}", *map(shlex.quote, words)]))
    return "\n".join([f"{ARRAY}=(", *lines, ")"]) + "\n"


def _usage(choice: Choice) -> Iterator[str]:
    yield f'Use: source THIS_FILE; torchrun ... pretrain_gpt.py "${{{ARRAY}[@]}}" ... with your data, tokenizer and'
    yield "learning rate."
    layout = _said(choice.layout, choice.model)
    if layout.zero in SHARDED:
        yield "unset CUDA_DEVICE_MAX_CONNECTIONS before: Megatron-FSDP asks for it."
    elif layout.tp > 1 or layout.cp > 1:
        yield "export CUDA_DEVICE_MAX_CONNECTIONS=1 before, on devices older than Blackwell: tp and cp ask for it."


def _problems(choice: Choice) -> Iterator[Problem]:
    """What the layout or the workload has and Megatron-LM lacks, where memory or results would be others."""
    model, workload = choice.model, choice.workload
    layout = _said(choice.layout, model)
    if layout.schedule not in SCHEDULES:
        rule = f"Megatron-LM has no such schedule, but {' and '.join(SCHEDULES)}"
        works = f"plan.axes.schedule=[{','.join(SCHEDULES)}]"
        yield Problem("plan.axes.schedule", layout.schedule, rule, works)
    if layout.zero in SHARDED and layout.pp > 1:
        rule = "Megatron-FSDP, which shards gradients and weights, documents no pipeline stages beside it"
        yield Problem("plan.axes.zero", layout.zero, rule, "plan.axes.zero=[0,1]")
    if layout.recomputed.activation and not layout.recomputed.full and not model.experts:
        rule = "Megatron-LM recomputes the activation of experts alone, of a dense feed-forward only the whole"
        yield Problem("plan.axes.recompute", layout.recompute, rule, "plan.axes.recompute=[none,full,norm]")
    if layout.cp > 1 and workload.sequence % (2 * layout.cp):
        rule = f"must be a multiple of 2 cp = {2 * layout.cp}: Megatron-LM gives each rank two parts of a sequence"
        share = 2 * layout.cp * layout.tp
        works = f"train.sequence={-(-workload.sequence // share) * share}"
        yield Problem("train.sequence", workload.sequence, rule, works)
    recipe = workload.recipe.name
    if recipe not in RECIPES:
        rule = f"Megatron-LM keeps no such bytes of a parameter, but those of {', '.join(RECIPES)}"
        yield Problem("task.recipe", recipe, rule, "task.recipe=mixed_18")
    if recipe == "fp8_deepseek" and layout.zero == 0:
        rule = "Megatron-LM keeps 16-bit moments and FP8 weights with its distributed optimizer alone"
        yield Problem("plan.axes.zero", layout.zero, rule, "plan.axes.zero=[1]")


def _notes(choice: Choice) -> Iterator[str]:
    """What only changes how fast a step is, or by next to nothing; each by name."""
    model = choice.model
    layout = _said(choice.layout, model)
    yield from speed_notes(choice, MEGATRON.project)
    if choice.execution.name == "piper":
        yield "Time and memory are predicted for piper_hpc's own executor, which fuses and overlaps less."
    if layout.zero in SHARDED:
        yield "Megatron-FSDP adds gradients up in a pass of its own, and overlaps what was predicted exposed."
    if extra := sorted({"mlp", "shared_experts"} & set(_modules(model, layout))):
        yield (
            f"recompute={layout.recompute}: --recompute-modules {' '.join(extra)} computes the whole of what "
            "Megatron-LM cannot recompute the activation of alone: no more memory than planned, and more time."
        )
    yield from megatron_model.notes(model)


def _parallelism(choice: Choice, layout: Layout) -> Arguments:
    model = choice.model
    given: Arguments = {"tensor-model-parallel-size": layout.tp}
    if layout.tp > 1 and choice.execution.sequence_parallel:
        given["sequence-parallel"] = True
    given |= {"context-parallel-size": layout.cp, "pipeline-model-parallel-size": layout.pp}
    if layout.stage_layers or model.layers % layout.stages:
        given["pipeline-model-parallel-layout"] = _stages(model, layout)
    elif layout.vpp > 1:
        given["num-virtual-stages-per-pipeline-rank"] = layout.vpp
    if model.experts:
        given |= {"expert-model-parallel-size": layout.ep, "expert-tensor-parallel-size": layout.etp}
    if layout.zero:
        given["use-distributed-optimizer"] = True
    if layout.zero in SHARDED:
        given |= {
            "use-megatron-fsdp": True,
            "data-parallel-sharding-strategy": SHARDED[layout.zero],
            "ckpt-format": "fsdp_dtensor",
            "init-model-with-meta-device": True,
            "no-gradient-accumulation-fusion": True,
        }
    elif choice.execution.overlap_grads:
        given["overlap-grad-reduce"] = True
        if layout.zero:
            given["overlap-param-gather"] = True
    return given


def _stages(model: ModelSpec, layout: Layout) -> str:
    """--pipeline-model-parallel-layout: E(mbedding), t(ransformer layer), m(ulti-token prediction), L(oss), stage by
    stage in the order of the layers."""
    stages = [f"t*{len(layers)}" for layers in layout.layers_by_stage(model.layers)]
    return f"E{'|'.join(stages)}{'m' * model.mtp_layers}L"


def _routing(choice: Choice) -> Arguments:
    if not choice.model.experts:
        return {}
    routing = choice.workload.routing
    given: Arguments = {"moe-token-dispatcher-type": "alltoall"}
    if routing.mode == "drop":
        given |= {
            "moe-expert-capacity-factor": float(routing.capacity_factor),
            "moe-pad-expert-input-to-capacity": True,
        }
    if routing.mode == "forced":
        given["moe-router-force-load-balancing"] = True
    return given


def _precision(choice: Choice) -> Arguments:
    fused = {"cross-entropy-loss-fusion": True} if choice.execution.fused_loss else {}
    return RECIPES[choice.workload.recipe.name] | fused


def _recompute(model: ModelSpec, layout: Layout) -> Arguments:
    """What is computed again; nothing for `none`."""
    if layout.recomputed.full:
        return {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    modules = _modules(model, layout)
    return {"recompute-granularity": "selective", "recompute-modules": modules} if modules else {}


def _modules(model: ModelSpec, layout: Layout) -> list[str]:
    """--recompute-modules. The activation of dense layers and shared experts goes with the whole of them; inside a MoE
    layer that is recomputed, nothing is named again."""
    parts = layout.recomputed
    modules = [module for part, module in MODULES.items() if getattr(parts, part)]
    if parts.full or not parts.activation:
        return [] if parts.full else modules
    if parts.moe:
        modules.remove("moe_act")
    elif model.shared_experts:
        modules.append("shared_experts")
    return modules + ["mlp"] * bool(model.dense_layers)
