"""Every option composes into checked facts; every broken rule is named with its key, value and a value that works."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from piper_hpc.config import ConfigError, Experiment, check_experiment, register
from piper_hpc.config.token_sources import token_sources
from piper_hpc.paths import data_folder
from piper_hpc.runs.checkpoints import Origin, Sidecar, new_folder
from piper_hpc.spec import Layout, RankMap, Recompute
from tests.full import examples, full
from tests.presets import experiment
from tests.tokens.made import made

CONF = data_folder("conf")
GROUPS = ("task", "model", "parallelism", "cluster", "data", "train", "tracking", "experiment")
# Presets that the executor has all parts of; only task=plan reasons about the others, see test_presets.
TRAINED = ("tiny", "small", "mixtral", "xmoe", "m10b")
OPTIONS = [
    (group, path.stem)
    for group in GROUPS
    for path in sorted((CONF / group).glob("*.yaml"))
    if group != "model" or path.stem.startswith((*TRAINED, "hf"))
]

PLANNED_ONLY = [
    path.stem
    for path in sorted((CONF / "cluster").glob("*.yaml"))
    if (facts := OmegaConf.load(path)).scheduler == "slurm" and "template" not in facts
]

# What an option needs beside it to make a run that fits together.
COMPANIONS = {
    ("data", "text"): ["data.path=" + str(CONF)],
    ("data", "tokens"): ["data.path={tokens}"],
    ("parallelism", "pp2_ep4"): ["cluster.ranks_per_node=8"],
    ("cluster", "frontier"): ["train.global_batch=512"],
    **{("cluster", name): ["task=plan"] for name in PLANNED_ONLY},
    ("experiment", "paper_mixtral"): ["task=plan"],
    ("model", "hf"): ["task=plan", "model.path=" + str(Path(__file__).with_name("qwen3_moe.json"))],
}


def companions(group: str, option: str) -> list[str]:
    elsewhere = group == "cluster" and option not in ("local", "testbed")  # ranks and batch of a plan are its own
    return COMPANIONS.get((group, option), ["task=plan"] if elsewhere else [])


def checked(*overrides: str) -> Experiment:
    return experiment(*overrides)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=lambda value: value)
def test_every_option_of_every_group_composes_into_checked_facts(group, option, tmp_path):
    tokens = made(tmp_path, [[[1] * 300]])
    found = checked(f"{group}={option}", *(each.format(tokens=tokens) for each in companions(group, option)))
    assert found.model.parameters > 0
    if found.layout is not None:
        assert found.layout.ranks == found.cluster.nodes * found.cluster.ranks_per_node


def test_every_group_has_options():
    assert {group for group, _ in OPTIONS} == set(GROUPS)


def test_the_default_is_pp2_ep2_on_four_local_ranks():
    found = checked()
    assert found.layout is not None
    assert (found.layout.pp, found.layout.ep, found.layout.dp, found.layout.ranks) == (2, 2, 1, 4)
    assert found.layout.micro_batches(found.workload.global_batch) == 8


def test_micro_benchmarks_are_not_held_to_a_training_layout():
    assert checked("task=microbench", "cluster=frontier").layout is None
    assert checked("task=microbench", "cluster.ranks_per_node=3").layout is None


def test_data_may_be_a_glob_over_folders():
    assert checked("data=text", f"data.path={CONF}/**/tiny.yaml").data.path is not None


def test_replicas_follow_from_the_ranks_where_dp_is_not_given():
    found = checked("cluster=testbed")
    assert found.layout is not None
    assert (found.layout.dp, found.layout.dense_dp) == (2, 4)


@pytest.mark.parametrize(
    ("override", "key", "value", "rule", "works"),
    [
        ("parallelism.ep=4", "parallelism", "ep=4", "= 8 must equal the ranks", "cluster.ranks_per_node=8"),
        ("parallelism.ep=4 model.experts=6 parallelism.pp=1", "parallelism.ep", "4", "must divide", "parallelism.ep=3"),
        ("model.layers=1", "parallelism.pp", "2", "at most model.layers = 1", "model.layers=2"),
        (
            "parallelism.schedule=interleaved parallelism.vpp=2 train.global_batch=4",
            "parallelism.schedule",
            "interleaved",
            "a multiple of pp=2 micro-batches",
            "parallelism.schedule=1f1b parallelism.vpp=1",
        ),
        ("train.global_batch=30", "train.global_batch", "30", "multiple of", "train.global_batch=32"),
        ("model.top_k=9", "model.top_k", "9", "model.experts = 8", "model.top_k=8"),
        ("model.kv_heads=3", "model.kv_heads", "3", "must divide model.heads = 4", "model.kv_heads=4"),
        ("model.hidden=126 model.head_dim=32", "model.hidden", "126", "multiple of 4", "model.hidden=128"),
        ("data=text", "data.path", "None", "must be given", "data.path="),
        ("data=tokens", "data.path", "None", "one of the two", "data.path=FOLDER"),
        ("data=tokens data.path=/nowhere", "data.path", "/nowhere", "has no index.json", "python -m piper_hpc.prepare"),
        ("data.sources=[{path:web}]", "data.sources", "web", "is for data=tokens", "data=tokens data.path=web"),
        ("data.document_starts=mask", "data.document_starts", "mask", "is for data=tokens", "document_starts=learn"),
        ("data.path=/nowhere", "data.path", "/nowhere", "holds no file", "data=stdlib"),
        ("model.vocab=100", "model.vocab", "100", "read as bytes", "model.vocab=256"),
        ("model.heads=256 model.kv_heads=256", "model.head_dim", "0", "greater than 0", "model.head_dim=2"),
        ("train.learning_rate=nan", "train.learning_rate", "nan", "greater than 0", "train.learning_rate=1"),
        ("task=microbench train.dtype=float64", "train.dtype", "float64", "no float64", "train.dtype=float32"),
        ("task=microbench task.backend=mpi", "task.backend", "mpi", "see each of them alone", "cluster=testbed"),
        (
            "task=plan cluster=frontier cluster.racks=[0]",
            "cluster.racks",
            "[0]",
            "each of the 8 nodes",
            "cluster.racks=",
        ),
        ("parallelism.tp=2", "parallelism.tp", "2", "must be one of 1", "parallelism.tp=1"),
        ("parallelism.schedule=zb", "parallelism.schedule", "zb", "must be one of 1f1b", "schedule=1f1b"),
        ("parallelism.schedule=zbv", "parallelism.schedule", "zbv", "vpp=2 chunks a rank", "parallelism.vpp=1"),
        (
            "parallelism.schedule=zb_h1 parallelism.recompute=full",
            "parallelism.recompute",
            "full",
            "splits the backward",
            "parallelism.recompute=selective",
        ),
        ("parallelism.recompute=norm", "parallelism.recompute", "norm", "to train", "parallelism.recompute=none"),
        ("parallelism.recompute=half", "parallelism.recompute", "half", "none, selective or", "recompute=none"),
        ("train.steps=0", "train.steps", "0", "greater than 0", "train.steps=1"),
        (
            "train.learning_rate=3e-4",
            "train.minimum_learning_rate",
            "0.0003",
            "below train.learning_rate = 0.0003; train.lr_schedule=constant",
            "train.minimum_learning_rate=3e-05",
        ),
        ("task=profile train.timing=false", "train.timing", "False", "shows where time went", "train.timing=true"),
        ("train.beta2=1.5", "train.beta2", "1.5", "[0, 1)", "train.beta2=0.95"),
        ("train.routing.skew=0.5", "train.routing.skew", "0.5", "at least 1", "train.routing.skew=1.5"),
        ("train.routing.mode=drop", "train.routing.mode", "drop", "drops no token", "train.routing.mode=dropless"),
        ("train.routing.histogram=[1,2]", "train.routing.histogram", "[1", "model.experts = 8", "histogram=null"),
        (
            "cluster=testbed cluster.template=x.sbatch",
            "cluster.template",
            "x.sbatch",
            "must name a batch script in",
            "generic.sbatch",
        ),
        ("cluster.calibration=/nowhere", "cluster.calibration", "/nowhere", "is no file", "calibration=auto"),
        ("runs_mode=777", "runs_mode", "777", "must be one of 700, 750, 770", "runs_mode=700"),
        ("runs_mode=0600", "runs_mode", "600", "must be one of 700, 750, 770", "runs_mode=700"),
        ("train.on_non_finite=ignore", "train.on_non_finite", "ignore", "must be one of stop", "on_non_finite=stop"),
        ("train.checkpoint_keep=-1", "train.checkpoint_keep", "-1", "not be negative", "train.checkpoint_keep=0"),
        ("train.resume_from=/nowhere", "train.resume_from", "/nowhere", "no checkpoints folder", "resume_from=null"),
        (
            "cluster=testbed cluster.racks=[0]",
            "cluster.racks",
            "[0]",
            "each of the 4 nodes",
            "cluster.racks=[0, 0, 0, 0]",
        ),
    ],
)
def test_a_broken_rule_is_named_with_a_value_that_works(override, key, value, rule, works):
    with pytest.raises(ConfigError) as caught:
        checked(*override.split())
    message = str(caught.value)
    assert message.startswith(f"{key} = ")
    assert value in message and rule in message and works in message


def test_tokens_that_the_model_has_no_row_for_are_refused_before_anything_starts(tmp_path):
    """By the largest id in the index: no shard is read, and no rank started."""
    tokens = made(tmp_path, [[[1] * 300, [256]]])
    with pytest.raises(ConfigError, match=r"model\.vocab = 256: .* has ids up to 256, .*this works: model\.vocab=1000"):
        checked("data=tokens", f"data.path={tokens}")
    assert checked("data=tokens", f"data.path={tokens}", "model.vocab=257").model.vocab == 257
    assert checked("data=tokens", f"data.path={tokens}", "task=plan").data.name == "tokens", "a plan reads nothing"


def test_tokens_may_be_of_several_sources_of_one_tokenizer(tmp_path):
    web, code = made(tmp_path / "web", [[[1] * 300]]), made(tmp_path / "code", [[[2] * 300]])
    other = made(tmp_path / "other", [[[3] * 300]], tokenizer="cd" * 32)
    found = checked("data=tokens", f"data.sources=[{{path:{web},weight:0.7}},{{path:{code},weight:0.3}}]")
    assert token_sources(found.data) == [(web, 0.7), (code, 0.3)]
    assert token_sources(checked("data=tokens", f"data.path={web}").data) == [(web, 1.0)]
    for override, named in (
        (f"data.sources=[{{path:{web}}},{{path:{other}}}]", "must be of one tokenizer, and are of 2: "),
        (
            f"data.sources=[{{path:{web},weight:0}}]",
            r"data\.sources\[0\]\.weight = 0.0: must be a number greater than 0",
        ),
        (f"data.path={web} train.sequence=300", r"has 300 tokens.*this works: train\.sequence=299"),
    ):
        with pytest.raises(ConfigError, match=named):
            checked("data=tokens", *override.split())


def test_parts_of_a_layer_are_recomputed_in_whatever_order_they_are_named():
    for named in ("attention+activation", "activation+attention"):
        layout = checked(f"parallelism.recompute={named}").layout
        assert layout is not None and layout.recomputed == Recompute(attention=1, activation=1)


def test_a_checkpoint_of_other_facts_is_refused_before_anything_starts(tmp_path: Path):
    model = checked().model
    origin = Origin.of(model, RankMap.block(Layout(), 1, (0,)), None, seed=7, dtype="float32")
    Sidecar(2, 16, 2, origin, {}, ()).write(new_folder(tmp_path, 2))
    resume = f"train.resume_from={tmp_path}"
    assert checked(resume, "train.seed=7").train.seed == 7
    with pytest.raises(ConfigError) as caught:
        checked(resume, "model.top_k=1")
    told = {problem.key: problem.works for problem in caught.value.problems}
    assert told == {"train.seed": "train.seed=7", "model.top_k": f"model.top_k={model.top_k}"}


def test_a_checkpoint_that_would_be_unpickled_is_refused(tmp_path: Path):
    (tmp_path / "step-00000002").mkdir()
    (tmp_path / "step-00000002" / ".metadata").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="of an earlier version, and would be unpickled"):
        checked(f"train.resume_from={tmp_path}")


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("float32", (4, 4, 0, 8)), ("float64", (8, 8, 0, 16)), ("bfloat16", (2, 4, 4, 8))],
)
def test_training_in_bf16_keeps_gradients_masters_and_moments_in_fp32(dtype, kept):
    recipe = checked(f"train.dtype={dtype}").workload.recipe
    assert (recipe.weight_bytes, recipe.gradient_bytes, recipe.master_bytes, recipe.moment_bytes) == kept
    assert checked("task=plan", f"train.dtype={dtype}", "task.recipe=bfloat16").workload.recipe.name == "bfloat16"


def test_a_schedule_may_be_left_to_be_chosen():
    layout = checked("parallelism.schedule=auto", "parallelism.pp=2").layout
    assert (layout.schedule, layout.pp) == ("auto", 2)
    with pytest.raises(ConfigError, match="Eq 9"):
        checked("parallelism.schedule=auto", "parallelism.pp=4", "model.layers=2", "cluster.ranks_per_node=8")


def test_a_network_that_no_counter_knows_is_refused():
    assert checked("cluster.fabric=ib").cluster.fabric == "ib"
    with pytest.raises(ConfigError, match="must be one of null, cxi, ib, socket"):
        checked("cluster.fabric=token_ring")


def test_a_site_can_ask_only_for_keys_that_there_are():
    with pytest.raises(ConfigError, match=r"cluster\.wants.*'project'.*cluster\.wants=\[account\]"):
        checked("cluster=frontier", "cluster.wants=[project]")


def test_all_broken_rules_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        checked("train.steps=-1", "model.heads=0", "parallelism.cp=4")
    assert {problem.key for problem in caught.value.problems} == {"train.steps", "model.heads", "parallelism.cp"}


@pytest.mark.slow
@settings(max_examples=examples(7, 25), deadline=None)
@given(
    pp=st.integers(1, 5),
    ep=st.integers(1, 5),
    ranks=st.integers(1, 16),
    batch=st.integers(1, 64),
    micro=st.integers(1, 3),
)
def test_the_value_that_works_works(pp, ep, ranks, batch, micro):
    """Following the advice leads to a configuration that passes, in a few rounds."""
    values = {
        "parallelism.pp": str(pp),
        "parallelism.ep": str(ep),
        "cluster.ranks_per_node": str(ranks),
        "train.global_batch": str(batch),
        "parallelism.micro_batch": str(micro),
    }
    for _ in range(6):
        try:
            checked(*(f"{key}={value}" for key, value in values.items()))
            return
        except ConfigError as error:
            for problem in error.problems:
                values |= dict(word.split("=", 1) for word in problem.works.split())
    raise AssertionError(f"still broken after following the advice: {values}")


def test_the_papers_cosine_comes_down_to_a_tenth():
    found = checked("model=small", "train=paper").train
    assert found.minimum_learning_rate == pytest.approx(found.learning_rate / 10)


def test_a_constant_rate_needs_no_minimum_below_it():
    assert checked("train.learning_rate=1e-4", "train.lr_schedule=constant").train.learning_rate == 1e-4


def test_a_resolved_configuration_means_the_same_when_read_back(tmp_path: Path):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", overrides=["model=small", "train.seed=7"])
    text = OmegaConf.to_yaml(composed, resolve=True)
    assert check_experiment(OmegaConf.create(text)) == check_experiment(composed)


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("+nonsense.key=1", "nonsense.key", ""),
        ("+nonsense=1", "nonsense", ""),
        ("+train.chekpoint_every=10", "train.chekpoint_every", "train.checkpoint_every"),
        ("++train.routing.skeww=2", "train.routing.skeww", "train.routing.skew"),
        ("+cluster.qoss=debug", "cluster.qoss", "cluster.qos"),
        ("+plan.axes.ppp=[2]", "plan.axes.ppp", "plan.axes.pp"),
        ("+cluster.topology.nic=2", "cluster.topology.nic", "cluster.topology.nics_per_node"),
        ("+cluster.data_sheet.links.node.latency=1", "cluster.data_sheet.links.node.latency", ""),
    ],
)
@pytest.mark.parametrize("task", ["train", pytest.param("plan", marks=full)])  # tests/test_launch.py has one of a plan
def test_a_key_that_nothing_reads_is_refused_with_the_nearest(task, override, key, nearest):
    with pytest.raises(ConfigError) as refused:
        checked("cluster=frontier", f"task={task}", override)
    (problem,) = refused.value.problems
    assert problem.key == key
    assert f"the nearest is {nearest}" in problem.rule


def test_free_dictionaries_take_any_key():
    found = checked(
        "+cluster.environment.NCCL_DEBUG=WARN",
        "+cluster.switches.a='n[1-2]'",
        "+cluster.sources.peak_flops=measured",
        "cluster.data_sheet.links.node.bytes_per_s=1e9",
        *("cluster=frontier", "task=plan"),
    )
    assert found.cluster.environment["NCCL_DEBUG"] == "WARN"
    assert found.cluster.switches["a"] == "n[1-2]"
    assert found.cluster.sources["peak_flops"] == "measured"
    assert found.cluster.data_sheet is not None
    assert found.cluster.data_sheet.links["node"].bytes_per_s == 1e9
