"""`plan.export`: what is written is what the plan chose, in names that are documented, and adds up as the other project
counts."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from piper_hpc.config.checks import EXPORTS
from piper_hpc.planner import Axes, plan
from piper_hpc.planner.export import TARGETS, check_file, compose, write
from piper_hpc.planner.export.choice import Choice
from piper_hpc.planner.export.vocabulary import TORCHTITAN
from piper_hpc.spec import RECIPES, Layout, Recompute, Routing, SpecError, Workload
from tests.planner.exports import choice, choices
from tests.planner.machines import DENSE, MOE, SMALL, WORKLOAD, cluster
from tests.presets import preset
from tests.resource_model.clusters import TINY
from tests.resource_model.clusters import cluster as small_cluster

GOLDEN = Path(__file__).parent / "golden"
MIXED = RECIPES["mixed_18"]
TO_MEGATRON = choices(
    schedules=("1f1b", "interleaved"), recipes=("mixed_18", "mixed_16", "float32", "fp8_mixed", "fp8_deepseek")
)
TO_TORCHTITAN = choices(
    schedules=("1f1b", "gpipe", "interleaved", "zbv", "dualpipev"),
    recompute=("none", "full"),
    recipes=("mixed_18", "float32", "bfloat16"),
)
"""Layouts of which each project can say many."""

many = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


def megatron_words(text: str) -> dict[str, list[str]]:
    """Arguments as a shell has them, by a reading of the tests' own."""
    words = shlex.split(text[text.index("=(") + 2 : text.rindex(")")], comments=True)
    starts = [index for index, word in enumerate(words) if word.startswith("--")]
    return {words[a]: words[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(words)], strict=True)}


def number(words: dict[str, list[str]], name: str, default: int = 1) -> int:
    """One whole number, or what Megatron-LM takes where it is not given."""
    return int(words[name][0]) if name in words else default


def said(one: Choice) -> tuple[Layout, Workload]:
    """What a file must say: everything but the algorithm of the all-to-all, the order of ranks and the skew."""
    return replace(one.layout, all_to_all="flat", placement="linear"), one.workload


def written(target: str, one: Choice) -> str | None:
    """The text, None where the project lacks something, which is then named with an override."""
    try:
        return TARGETS[target].write(one).text
    except SpecError as error:
        for problem in error.problems:
            assert problem.key.split(".")[0] in ("plan", "task", "train", "model"), problem
            assert re.match(r"[a-z_.]+=\S+", problem.works) and problem.rule, problem
        return None


def test_every_project_of_the_schema_has_its_writer() -> None:
    assert set(EXPORTS) == set(TARGETS)


def check_round_trip(project: str, one: Choice) -> None:
    text = written(project, one)
    if text is not None:
        reading = TARGETS[project].read(text, one.model, one.layout.ranks)
        assert (reading.layout, reading.workload) == said(one)


@many
@given(TO_MEGATRON | choices())
def test_megatron_arguments_say_what_the_plan_chose(one: Choice) -> None:
    check_round_trip("megatron", one)


@many
@given(TO_TORCHTITAN | choices())
def test_torchtitan_keys_say_what_the_plan_chose(one: Choice) -> None:
    check_round_trip("torchtitan", one)


@many
@given(TO_MEGATRON)
def test_megatron_arguments_add_up_as_megatron_counts(one: Choice) -> None:
    """Its `validate_args` and `parallel_state`: dp = world / (tp pp cp), experts' dp = world / (etp ep pp), ..."""
    text = written("megatron", one)
    if text is None:
        return
    words, layout, model = megatron_words(text), one.layout, one.model
    tp, pp, cp = (
        number(words, f"--{name}-size")
        for name in ("tensor-model-parallel", "pipeline-model-parallel", "context-parallel")
    )
    ep, etp = number(words, "--expert-model-parallel-size"), number(words, "--expert-tensor-parallel-size", tp)
    world = layout.ranks
    assert world % (tp * pp * cp) == 0
    dp = world // (tp * pp * cp)
    micro, batch = number(words, "--micro-batch-size"), number(words, "--global-batch-size")
    assert batch % (micro * dp) == 0
    micro_batches = batch // (micro * dp)
    assert (dp, micro_batches) == (layout.dense_dp, one.micro_batches)
    if model.experts:
        assert world % (etp * ep * pp) == 0 and number(words, "--num-experts") % ep == 0
        assert world // (etp * ep * pp) == layout.dp
        assert tp == 1 or "--sequence-parallel" in words  # experts with tensor parallelism ask for it
    layers = number(words, "--num-layers")
    if "--pipeline-model-parallel-layout" in words:
        (stages,) = words["--pipeline-model-parallel-layout"]
        unrolled = re.sub(r"(.)\*(\d+)", lambda run: run[1] * int(run[2]), stages)
        assert unrolled.startswith("E") and unrolled.endswith("L")
        held = [stage.count("t") for stage in unrolled.split("|")]
        assert sum(held) == layers and "--num-virtual-stages-per-pipeline-rank" not in words
        assert unrolled.count("m") == number(words, "--mtp-num-layers", 0)
    else:
        chunks = number(words, "--num-virtual-stages-per-pipeline-rank")
        assert layers % (pp * chunks) == 0
        held = [layers // (pp * chunks)] * (pp * chunks)
    assert held == [len(layers) for layers in layout.layers_by_stage(model.layers)]
    if len(held) > pp:
        assert pp > 1 and micro_batches % pp == 0
    heads = number(words, "--num-attention-heads")
    groups = number(words, "--num-query-groups", heads)
    assert heads % tp == 0 and (groups % tp == 0 or tp % groups == 0)
    assert cp == 1 or number(words, "--seq-length") % (2 * cp) == 0
    if "--moe-layer-freq" in words:
        (pattern,) = words["--moe-layer-freq"]
        assert not re.search(r"[^,\d\[\]()+*]", pattern)  # what Megatron-LM evaluates
        assert eval(pattern) == [model.is_moe(layer) for layer in range(layers)]
    if "--use-megatron-fsdp" in words:
        assert words["--ckpt-format"] == ["fsdp_dtensor"] and pp == 1
    assert "--overlap-param-gather" not in words or {"--use-distributed-optimizer", "--overlap-grad-reduce"} <= set(
        words
    )


@many
@given(TO_TORCHTITAN)
def test_torchtitan_keys_add_up_as_torchtitan_counts(one: Choice) -> None:
    """Its `ParallelDims`, `train.py` and `pipeline_parallel.py`; TOML by a reader that is not this project's."""
    toml: Any = pytest.importorskip("tomllib")
    text = written("torchtitan", one)
    if text is None:
        return
    config, layout, model = toml.loads(text), one.layout, one.model
    assert {f"{section}.{key}" for section, keys in config.items() for key in keys} <= set(TORCHTITAN.names)
    parallel, training = config["parallelism"], config["training"]
    replicate, shard = parallel["data_parallel_replicate_degree"], parallel["data_parallel_shard_degree"]
    tp, cp, pp = (parallel[f"{axis}_parallel_degree"] for axis in ("tensor", "context", "pipeline"))
    assert replicate * shard * cp * tp * pp == layout.ranks
    ep, etp = parallel.get("expert_parallel_degree", 1), parallel.get("expert_tensor_parallel_degree", 1)
    if ep > 1:
        # Expert parallelism borrows from data, context and tensor parallelism.
        assert etp in (1, tp) and shard * cp * tp % (ep * etp) == 0
        assert shard * cp * tp // (ep * etp) * replicate == layout.dp
    data_parallel = replicate * shard
    local, batch = training["local_batch_size"], training["global_batch_size"]
    assert batch % (local * data_parallel) == 0
    accumulated = batch // (local * data_parallel)
    if pp > 1:
        micro = parallel["pipeline_parallel_microbatch_size"]
        assert local % micro == 0 and accumulated == 1
        micro_batches, stages = local // micro, parallel["module_fqns_per_model_part"]
        single = parallel["pipeline_parallel_schedule"] in ("1F1B", "GPipe")
        assert len(stages) % pp == 0 and (len(stages) == pp) == single
        assert parallel["pipeline_parallel_schedule"] != "1F1B" or micro_batches >= pp
        names = [name for stage in stages for name in stage]
        assert names == ["tok_embeddings", *(f"layers.{layer}" for layer in range(model.layers)), "norm", "output"]
    else:
        micro_batches = accumulated
    assert micro_batches == one.micro_batches
    assert training["seq_len"] % (tp * 2 * cp) == 0
    # DDP stands alone, and 16-bit products need FSDP wherever a model is split.
    if replicate > 1:
        assert shard * cp * tp * pp * ep == 1
    if training["mixed_precision_param"] != training["dtype"] and tp * pp > 1:
        assert shard * cp > 1 or ep > 1


def parameters_of(words: dict[str, list[str]]) -> int:
    """Parameters of the model that Megatron-LM's arguments describe, of a gated RMSNorm decoder without biases but of
    query, key and value."""

    def of(name: str, default: int = 0) -> int:
        return number(words, f"--{name}", default)

    layers, hidden, heads = of("num-layers"), of("hidden-size"), of("num-attention-heads")
    assert {"--swiglu", "--disable-bias-linear"} <= set(words) and words["--normalization"] == ["RMSNorm"]
    if "--multi-latent-attention" in words:
        nope, rope, value = of("qk-head-dim"), of("qk-pos-emb-head-dim"), of("v-head-dim")
        query, latent = of("q-lora-rank"), of("kv-lora-rank")
        down = hidden * query + hidden * (latent + rope) + query + latent  # with their norms
        attention = down + query * heads * (nope + rope) + latent * heads * (nope + value) + heads * value * hidden
    else:
        width, groups = of("kv-channels"), of("num-query-groups", heads)
        attention = 2 * hidden * width * (heads + groups) + ("--add-qkv-bias" in words) * width * (heads + 2 * groups)
        attention += ("--qk-layernorm" in words) * 2 * width
    with_experts = (
        eval(words["--moe-layer-freq"][0]) if "--moe-layer-freq" in words else ["--num-experts" in words] * layers
    )
    expert = 3 * hidden * of("moe-ffn-hidden-size")
    moe = of("num-experts") * (expert + hidden) + 3 * hidden * of("moe-shared-expert-intermediate-size")
    moe += hidden * ("--moe-shared-expert-gate" in words)
    feed_forward = sum(moe if kind else 3 * hidden * of("ffn-hidden-size") for kind in with_experts)
    embeddings = of("vocab-size") * hidden * (1 + ("--untie-embeddings-and-output-weights" in words))
    return layers * (attention + 2 * hidden) + feed_forward + embeddings + hidden


@pytest.mark.parametrize(
    "name", ["mixtral_8x7b", "qwen2_57b_a14b", "qwen3_235b_a22b", "deepseek_v3", "deepseek_v2", "llama3_70b", "kimi_k2"]
)
def test_megatron_arguments_describe_a_model_of_as_many_parameters(name: str) -> None:
    model = preset(name)
    text = TARGETS["megatron"].write(choice(model, Layout(zero=1), Workload(4, 4096, MIXED))).text
    assert parameters_of(megatron_words(text)) == model.parameters


DEEPSEEK = choice(
    preset("deepseek_v3"),
    Layout(16, 1, 16, 1, 1, 2, 4, 1, "1f1b", 1, "norm+activation+mla_up", "halo_dedup", "strided"),
    Workload(1920, 4096, MIXED),
)
QWEN = choice(
    preset("qwen3_30b_a3b"),
    Layout(4, 2, 8, 1, 2, 2, 4, 1, "zbv", 1, "full", "halo3"),
    Workload(256, 4096, MIXED),
)


@pytest.mark.parametrize(
    ("target", "one", "golden"), [("megatron", DEEPSEEK, "deepseek_v3.sh"), ("torchtitan", QWEN, "qwen3_30b_a3b.toml")]
)
def test_a_file_is_as_ever(target: str, one: Choice, golden: str) -> None:
    assert TARGETS[target].write(one).text == (GOLDEN / golden).read_text()


def with_layout(one: Choice, **degrees: Any) -> Choice:
    return replace(one, best=replace(one.best, layout=replace(one.layout, **degrees)))


@pytest.mark.parametrize(
    ("target", "one", "key", "works"),
    [
        ("megatron", with_layout(DEEPSEEK, schedule="zb_h1"), "plan.axes.schedule", "[1f1b,interleaved]"),
        ("megatron", with_layout(DEEPSEEK, zero=3), "plan.axes.zero", "[0,1]"),
        ("megatron", replace(DEEPSEEK, workload=Workload(1920, 4096, RECIPES["bfloat16"])), "task.recipe", "mixed_18"),
        ("megatron", replace(DEEPSEEK, model=preset("arctic")), "model.dense_residual_ffn", "=0"),
        ("megatron", replace(DEEPSEEK, model=preset("llama4_maverick")), "model.window_kind", "sliding"),
        (
            "megatron",
            with_layout(choice(DENSE, Layout(), WORKLOAD), recompute="activation"),
            "plan.axes.recompute",
            "full",
        ),
        ("torchtitan", with_layout(QWEN, schedule="zb_h1", vpp=1), "plan.axes.schedule", "[1f1b,interleaved]"),
        ("torchtitan", with_layout(QWEN, zero=3), "plan.axes.zero", "[1] plan.axes.pp=[4]"),
        ("torchtitan", with_layout(QWEN, zero=0), "plan.axes.zero", "[1] plan.axes.pp=[4]"),
        ("torchtitan", with_layout(QWEN, pp=1, vpp=1, schedule="1f1b"), "plan.axes.zero", "[2,3] plan.axes.pp=[1]"),
        ("torchtitan", with_layout(QWEN, recompute="norm+moe"), "plan.axes.recompute", "[none,full]"),
        ("torchtitan", with_layout(QWEN, tp=8, dp=16), "plan.axes.tp", "[1,2,4]"),
        ("torchtitan", with_layout(QWEN, etp=4, dp=1), "plan.axes.etp", "[1] plan.axes.ep=[8]"),
        ("torchtitan", with_layout(DEEPSEEK, recompute="full"), "plan.axes.cp", "[1]"),
        ("torchtitan", replace(QWEN, workload=Workload(256, 4096, RECIPES["mixed_16"])), "task.recipe", "mixed_18"),
        ("torchtitan", replace(QWEN, workload=Workload(256, 4098, MIXED)), "train.sequence", "=4104"),
        (
            "torchtitan",
            replace(QWEN, workload=Workload(256, 4096, MIXED, Routing("drop"))),
            "train.routing.mode",
            "dropless",
        ),
        ("torchtitan", replace(QWEN, model=replace(QWEN.model, mtp_layers=1)), "model.mtp_layers", "=0"),
    ],
)
def test_what_a_project_cannot_say_is_refused_by_name(target: str, one: Choice, key: str, works: str) -> None:
    with pytest.raises(SpecError) as raised:
        TARGETS[target].write(one)
    assert [problem for problem in raised.value.problems if problem.key == key and works in problem.works]


def test_what_changes_speed_alone_is_named_in_the_file() -> None:
    for target, one in (("megatron", DEEPSEEK), ("torchtitan", with_layout(QWEN, placement="strided"))):
        comments = " ".join(
            line.lstrip("# ") for line in TARGETS[target].write(one).text.splitlines() if line.startswith("#")
        )
        assert f"all_to_all={one.layout.all_to_all}" in comments and "placement=strided" in comments
    plain = choice(preset("mixtral_8x7b"), Layout(ep=8, zero=1), Workload(8, 4096, MIXED))
    assert "not as in the plan" not in TARGETS["megatron"].write(plain).text
    mixtral = replace(QWEN, model=preset("mixtral_8x7b"))
    assert "ships none of these sizes" in TARGETS["torchtitan"].write(mixtral).text


@pytest.mark.parametrize("part", [field.name for field in fields(Recompute)])
def test_megatron_never_keeps_more_than_was_planned(part: str) -> None:
    """What of a part has no module of its own is recomputed as a whole."""
    model = preset("deepseek_v3")
    text = TARGETS["megatron"].write(choice(model, Layout(recompute=part), Workload(4, 4096, MIXED))).text
    modules = set(megatron_words(text).get("--recompute-modules", []))
    assert ({"mlp", "shared_experts"} <= modules) == (part == "activation")


@pytest.mark.parametrize(
    ("target", "one", "old", "new"),
    [
        ("megatron", DEEPSEEK, "--seq-length", "--sequence-length"),
        ("megatron", DEEPSEEK, "alltoall", "halo_dedup"),
        ("megatron", DEEPSEEK, "--num-layers 61", "--num-layers 60"),
        ("megatron", DEEPSEEK, "--bf16", "--bf16 --bf16"),
        ("megatron", DEEPSEEK, "t*3L", "t*2L"),
        ("megatron", DEEPSEEK, "--context-parallel-size 2", "--context-parallel-size 3"),
        ("torchtitan", QWEN, "seq_len", "sequence_length"),
        ("torchtitan", QWEN, "ZBVZeroBubble", "ZBH1"),
        ("torchtitan", QWEN, "tensor_parallel_degree = 2", "tensor_parallel_degree = 4"),
        ("torchtitan", QWEN, "layers.17", "layers.18"),
    ],
)
def test_what_is_not_documented_or_does_not_fit_is_not_read(target: str, one: Choice, old: str, new: str) -> None:
    text = TARGETS[target].write(one).text
    assert old in text
    with pytest.raises(ValueError):
        TARGETS[target].read(text.replace(old, new), one.model, one.layout.ranks)


@pytest.mark.parametrize("target", TARGETS)
def test_a_plan_is_exported_and_reads_as_its_best_layout(target: str, tmp_path: Path) -> None:
    axes = replace(
        SMALL,
        schedule=("1f1b",),
        vpp=(1,),
        zero=(1,),
        etp=(1,),
        tp=(1,),
        pp=(2,),
        recompute=("none", "full"),
        micro_batch=(1,),
    )
    found = plan(MOE, cluster(), WORKLOAD, executor="megatron", axes=axes)
    path = check_file(target, None, tmp_path)
    write(compose(found, MOE, target), path)
    best = found.candidates[0].layout
    assert path.name == TARGETS[target].file
    reading = TARGETS[target].read(path.read_text(), MOE, best.ranks)
    assert reading.layout == replace(best, all_to_all="flat", placement="linear") and reading.workload == WORKLOAD


@pytest.mark.parametrize(
    ("target", "asked"),
    [
        ("megatron", {"pp": (2, 4), "schedule": ("dualpipev",)}),
        ("torchtitan", {"recompute": ("norm+moe", "none", "full")}),
    ],
)
def test_what_a_refusal_suggests_makes_a_plan_that_is_exported(target: str, asked: dict[str, Any]) -> None:
    axes, refused = replace(SMALL, **asked), 0
    while True:
        found = plan(MOE, cluster(), WORKLOAD, executor="megatron", axes=axes)
        try:
            assert compose(found, MOE, target)
            break
        except SpecError as error:
            refused += 1
            overrides = dict(word.split("=") for problem in error.problems for word in problem.works.split())
            axes = Axes.of(vars(axes) | {key.split(".")[2]: yaml.safe_load(value) for key, value in overrides.items()})
    assert 1 <= refused <= 3


def test_no_plan_has_no_file() -> None:
    found = plan(TINY, small_cluster(nodes=5, ranks_per_node=1), Workload(1, 128), executor="piper", ranks=[5])
    assert not found.candidates
    with pytest.raises(SpecError, match="no layout fits"):
        compose(found, TINY, "megatron")


def test_a_file_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.sh").write_text("edited by hand")
    for name, rule in ((".", "is a folder"), ("mine.sh", "replaces no other"), ("nowhere/best.sh", "does not")):
        with pytest.raises(SpecError, match=rule) as raised:
            check_file("megatron", name, tmp_path)
        assert raised.value.problems[0].works == "plan.export_file=best.sh"
    with pytest.raises(SpecError, match="cannot be written"):
        write("text", tmp_path / "mine.sh")
    assert (tmp_path / "mine.sh").read_text() == "edited by hand"
