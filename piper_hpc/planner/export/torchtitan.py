"""A layout as torchtitan's job configuration, a TOML file. Version and names: `vocabulary.TORCHTITAN`.

Later than that version torchtitan takes configurations as Python functions, with other names of the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from piper_hpc.planner.export.choice import Choice, Reading, Written, plain, said_workload, shards, speed_notes
from piper_hpc.planner.export.torchtitan_model import Flavor, flavor_of
from piper_hpc.planner.export.vocabulary import TORCHTITAN
from piper_hpc.spec import Layout, ModelSpec, Problem, SpecError

SCHEDULES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved": "Interleaved1F1B",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}

RECIPES = {
    "float32": {"dtype": "float32", "mixed_precision_param": "float32"},
    "mixed_18": {"dtype": "float32", "mixed_precision_param": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16", "mixed_precision_param": "bfloat16"},
}
"""[training] by recipe; gradients are always reduced in float32."""

RESHARD = {1: "never", 2: "never", 3: "always"}
"""fsdp_reshard_after_forward by ZeRO stage. Pipelines of torch keep gradients whole until the last micro-batch, so that
`never` is stage 1 with pipeline stages, and stage 2 without."""

RECOMPUTE = ("none", "full")

Keys = dict[str, dict[str, Any]]
"""Section -> key -> value."""


def write(choice: Choice) -> Written:
    """SpecError names everything that torchtitan cannot say, each with an override that a plan can take."""
    if problems := [*_layout_problems(choice), *_model_problems(choice)]:
        raise SpecError(*problems)
    says = Reading(_said(choice.layout, choice.model), said_workload(choice))
    keys, flavor = _keys(choice, says.layout), flavor_of(choice.model)
    head = choice.head(TORCHTITAN, _usage(), _notes(choice, flavor))
    return Written(head + _toml(keys), says)


def _said(layout: Layout, model: ModelSpec) -> Layout:
    said = plain(layout, model)
    return said if shards(layout) else replace(said, zero=0)


def _toml(keys: Keys) -> str:
    """Sections of TOML; its strings, numbers, truths and lists are JSON's."""
    lines = []
    for section, values in keys.items():
        lines.append(f"\n[{section}]")
        for key, value in values.items():
            TORCHTITAN.check(f"{section}.{key}", value)
            lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _usage() -> Iterator[str]:
    yield f"Later than {TORCHTITAN.version} torchtitan is configured in Python, with other names of the batch."
    yield "Use: CONFIG_FILE=THIS_FILE ./run_train.sh, with your data, optimizer and checkpoints added to the file."


def _layout_problems(choice: Choice) -> Iterator[Problem]:
    """Degrees, schedule and sharding that torchtitan lacks."""
    layout, moe = choice.layout, choice.model.experts > 0
    if layout.schedule not in (SCHEDULES if layout.pp > 1 else ("1f1b",)):
        rule = f"torchtitan has no such schedule of {layout.pp} stages, but {', '.join(SCHEDULES)}"
        yield Problem("plan.axes.schedule", layout.schedule, rule, "plan.axes.schedule=[1f1b,interleaved]")
    if layout.pp > 1 and layout.schedule == "1f1b" and choice.micro_batches < layout.pp:
        rule = f"torch's 1F1B needs pp = {layout.pp} micro-batches at least, the best plan has {choice.micro_batches}"
        works = f"train.global_batch={layout.pp * layout.micro_batch * layout.dense_dp}"
        yield Problem("train.global_batch", choice.workload.global_batch, rule, works)
    if moe and layout.ep > 1 and layout.etp not in (1, layout.tp):
        works = f"plan.axes.etp=[1] plan.axes.ep=[{layout.ep}]"
        yield Problem("plan.axes.etp", layout.etp, f"torchtitan has 1 or tp = {layout.tp}", works)
    if moe and layout.ep == 1 and layout.etp != layout.tp:
        rule = f"torchtitan splits experts as all else where ep is 1: etp must be tp = {layout.tp}"
        yield Problem("plan.axes.etp", layout.etp, rule, "plan.axes.tp=[1] plan.axes.etp=[1]")
    yield from _zero_problems(layout)
    if plain(layout, choice.model).recompute not in RECOMPUTE:
        rule = "torchtitan chooses what it recomputes by operator, and has no parts: none or full"
        yield Problem("plan.axes.recompute", layout.recompute, rule, "plan.axes.recompute=[none,full]")


def _zero_problems(layout: Layout) -> Iterator[Problem]:
    """FSDP shards optimizer and gradients at least, DDP nothing and stands alone."""
    if not shards(layout):
        return
    works = f"plan.axes.zero=[{'1' if layout.pp > 1 else '2,3'}] plan.axes.pp=[{layout.pp}]"
    if layout.zero == 0 and layout.pp * layout.tp * layout.cp * layout.ep * layout.etp > 1:
        rule = "torchtitan's DDP goes with no other parallelism"
        yield Problem("plan.axes.zero", layout.zero, rule, works)
    if layout.zero == 1 and layout.pp == 1:
        rule = "FSDP shards gradients too where there are no pipeline stages"
        yield Problem("plan.axes.zero", layout.zero, rule, works)
    if layout.zero > 1 and layout.pp > 1:
        rule = "torch's pipelines keep gradients whole until the last micro-batch, which is ZeRO 1"
        yield Problem("plan.axes.zero", layout.zero, rule, works)


def _model_problems(choice: Choice) -> Iterator[Problem]:
    """What of model and workload torchtitan lacks."""
    layout, model, workload = choice.layout, choice.model, choice.workload
    if model.mtp_layers:
        rule = "torchtitan has no multi-token prediction"
        yield Problem("model.mtp_layers", model.mtp_layers, rule, "model.mtp_layers=0")
    if model.attention == "gqa" and model.kv_heads % layout.tp:
        rule = f"torchtitan splits whole key and value heads: model.kv_heads = {model.kv_heads}"
        fitting = [tp for tp in (1, 2, 4, 8) if model.kv_heads % tp == 0]
        yield Problem("plan.axes.tp", layout.tp, rule, f"plan.axes.tp=[{','.join(map(str, fitting))}]")
    flavor = flavor_of(model)
    if layout.cp > 1 and flavor is not None and flavor.flex:
        rule = f"torchtitan's {flavor.name} {flavor.flavor} has FlexAttention, which splits no sequence"
        yield Problem("plan.axes.cp", layout.cp, rule, "plan.axes.cp=[1]")
    multiple = 2 * layout.tp * layout.cp
    if workload.sequence % multiple:
        works = f"train.sequence={-(-workload.sequence // multiple) * multiple}"
        yield Problem("train.sequence", workload.sequence, f"must be a multiple of 2 tp cp = {multiple}", works)
    recipe = workload.recipe.name
    if recipe not in RECIPES:
        rule = f"torchtitan keeps no such bytes of a parameter, but those of {', '.join(RECIPES)}"
        yield Problem("task.recipe", recipe, rule, "task.recipe=mixed_18")
    # Without FSDP only DDP and a single device compute in 16 bits (autocast).
    alone = layout.dense_dp * layout.cp == 1 and not (model.experts and layout.ep > 1)
    if recipe == "mixed_18" and alone and layout.tp * layout.pp > 1:
        rule = "torchtitan mixes precisions with data, context or expert parallelism alone, and here is none"
        yield Problem("task.recipe", recipe, rule, "task.recipe=bfloat16")
    if model.experts and workload.routing.mode == "drop":
        rule = "torchtitan computes every row"
        yield Problem("train.routing.mode", "drop", rule, "train.routing.mode=dropless")


def _notes(choice: Choice, flavor: Flavor | None) -> Iterator[str]:
    """What only changes how fast a step is, or by next to nothing; each by name."""
    layout = choice.layout
    yield from speed_notes(choice, TORCHTITAN.project)
    own = "piper_hpc's own" if choice.execution.name == "piper" else "Megatron-Core's"
    yield f"Time and memory are predicted for {own} kernels and overlap; torchtitan has others: take them as a guide."
    if choice.workload.recipe.name == "mixed_18":
        yield (
            "task.recipe=mixed_18: float32 weights, with 16-bit copies while they are used, instead of 16-bit weights "
            "beside a float32 master."
        )
    if layout.zero and shards(layout) and layout.schedule in ("interleaved", "zbv", "dualpipev"):
        yield "Pipelines of several stages a rank may gather and free weights stage by stage."
    if flavor is None:
        model = choice.model
        yield (
            f"The model: torchtitan {TORCHTITAN.version} ships none of these sizes. Register one as [model] names it: "
            f"{model.layers} layers, hidden {model.hidden}, {model.heads} heads, {model.kv_heads} of keys, "
            f"{model.experts} experts of {model.expert_ffn}, {model.top_k} a token."
        )


def _keys(choice: Choice, layout: Layout) -> Keys:
    model, workload = choice.model, choice.workload
    flavor = flavor_of(model) or Flavor(model.name, model.name)
    # A pipeline cuts its local batch into micro-batches; without one every micro-batch is a local batch of its own.
    local = layout.micro_batch * (choice.micro_batches if layout.pp > 1 else 1)
    keys: Keys = {
        "model": {"name": flavor.name, "flavor": flavor.flavor},
        "training": {
            "seq_len": workload.sequence,
            "local_batch_size": local,
            "global_batch_size": workload.global_batch,
            **RECIPES[workload.recipe.name],
            "mixed_precision_reduce": "float32",
        },
        "parallelism": _parallelism(choice, layout),
        "activation_checkpoint": {"mode": layout.recompute},
    }
    if model.experts and workload.routing.mode == "forced":
        keys["debug"] = {"moe_force_load_balance": True}
    return keys


def _parallelism(choice: Choice, layout: Layout) -> dict[str, Any]:
    model, replicated = choice.model, layout.zero == 0
    given: dict[str, Any] = {
        "data_parallel_replicate_degree": layout.dense_dp if replicated else 1,
        "data_parallel_shard_degree": 1 if replicated else layout.dense_dp,
        **({} if replicated else {"fsdp_reshard_after_forward": RESHARD[layout.zero]}),
        "tensor_parallel_degree": layout.tp,
        "context_parallel_degree": layout.cp,
    }
    if model.experts:
        given |= {
            "expert_parallel_degree": layout.ep,
            "expert_tensor_parallel_degree": layout.etp,
            "expert_parallel_comm_backend": "standard",
        }
    given["pipeline_parallel_degree"] = layout.pp
    if layout.pp > 1:
        given |= {
            "pipeline_parallel_schedule": SCHEDULES[layout.schedule],
            "pipeline_parallel_microbatch_size": layout.micro_batch,
            "module_fqns_per_model_part": _modules(layout, model.layers),
        }
    if layout.schedule == "dualpipev" and model.experts:
        given["pipeline_parallel_expert_parallel_overlap"] = choice.execution.overlap_experts
    return given


def _modules(layout: Layout, layers: int) -> list[list[str]]:
    """Names of the modules of every stage, in the order of the layers."""
    stages = [[f"layers.{layer}" for layer in stage] for stage in layout.layers_by_stage(layers)]
    stages[0].insert(0, "tok_embeddings")
    stages[-1] += ["norm", "output"]
    return stages
