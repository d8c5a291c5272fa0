"""The rules of a configuration. Each check yields what it finds wrong, with a value that works."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from glob import iglob
from importlib.util import find_spec
from pathlib import Path

from piper_hpc.config.errors import Problem
from piper_hpc.config.schema import ClusterConfig, Config, TrainConfig
from piper_hpc.config.token_sources import token_problems, token_sources
from piper_hpc.paths import batch_template, batch_templates, data_folder
from piper_hpc.runs.checkpoints import SIDECAR, Sidecar, newest
from piper_hpc.spec import ALGORITHMS, AUTO, BASELINES, RECIPES, TIERS, Layout, ModelSpec, Workload, executor
from piper_hpc.spec.fabric import FABRICS
from piper_hpc.spec.migration import MIGRATIONS, OFF
from piper_hpc.spec.routing_workloads import WORKLOADS
from piper_hpc.spec.rules import layout_problems
from piper_hpc.tokens.folder import TokenIndex
from piper_hpc.tokens.mixture import too_short

SUITES = (
    *("calibration", "gemm", "grouped_gemm", "attention"),
    *("p2p", "all_reduce", "reduce_scatter", "all_gather", "all_to_all", "dispatch"),
)
"""What task=microbench measures: `calibration` is what predictions ask for, each other suite one subject widely."""

EXPORTS = ("megatron", "torchtitan")
"""Projects whose own arguments a plan can be written as; see piper_hpc.planner.export."""

CHOICES = {
    "task.name": ("train", "microbench", "profile", "plan"),
    "task.executor": ("auto", "piper", "megatron"),
    "task.backend": ("torch", "mpi"),
    "task.rank_by": ("mfu", "tokens_per_s", "memory"),
    "task.ep_domain": ("none", "switch", "node"),
    "parallelism.all_to_all": (*ALGORITHMS, AUTO, *BASELINES),
    **{f"parallelism.{axis}": values for axis, values in executor.LAYOUT_AXES.items() if axis != "recompute"},
    "parallelism.migration": MIGRATIONS,
    "parallelism.schedule": (*executor.LAYOUT_AXES["schedule"], AUTO),
    "cluster.scheduler": ("local", "slurm", "pbs"),
    "cluster.device": ("auto", "cpu", "cuda", "xpu"),
    "cluster.fabric": (None, *FABRICS),
    "cluster.quota": ("auto", "off"),
    "cluster.go_on": ("requeue", "chain", "off"),
    "cluster.domains": ("auto", "measured"),
    "task.recipe": (None, *RECIPES),
    "plan.export": (None, *EXPORTS),
    "data.document_starts": ("learn", "mask"),
    "train.lr_schedule": ("cosine", "constant"),
    "train.on_non_finite": ("stop", "skip"),
    "train.routing.workload": (None, *WORKLOADS),
    "train.routing.mode": ("dropless", "drop", "forced"),
    "train.dtype": ("float32", "float64", "bfloat16"),
    "tracking.name": ("none", "wandb_offline", "wandb"),
    "sweep.name": ("grid", "plan"),
    "format": ("text", "json"),
    "runs_mode": (700, 750, 770),
}

POSITIVE = (
    *(f"parallelism.{key}" for key in ("pp", "ep", "micro_batch", "migration_every")),
    *(f"cluster.{key}" for key in ("nodes", "ranks_per_node", "time_min", "cpus_per_task", "comm_timeout_s")),
    "cluster.switch_wait_min",
    *(f"train.{key}" for key in ("steps", "global_batch", "sequence", "learning_rate", "grad_clip")),
    *(f"task.{key}" for key in ("budget_s", "cell_s", "candidates", "profile_steps")),
    *(f"sweep.{key}" for key in ("top", "start_s", "stall_s")),
)

ACCELERATORS = data_folder("conf") / "accelerator"
"""One file a device, of its data sheet's facts."""

BYTES = 256
"""Values of a byte: what the vocabulary of a byte-level model must hold."""


def example_of(key: str) -> str:
    """An override that sets a key which must be given."""
    return f"{key}=1"


def _value(config: Config, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def choices(config: Config) -> Iterator[Problem]:
    """Values that must be one of a few."""
    for key, allowed in CHOICES.items():
        value = _value(config, key)
        if value not in allowed:
            listed = ", ".join("null" if choice is None else str(choice) for choice in allowed)
            yield Problem(key, value, f"must be one of {listed}", f"{_override(key)}={listed.split(', ')[0]}")


def _override(key: str) -> str:
    # These are groups whose option carries the name.
    return key.removesuffix(".name") if key in ("task.name", "tracking.name", "sweep.name") else key


def positive(config: Config) -> Iterator[Problem]:
    """Counts and limits that make sense only above zero."""
    for key in POSITIVE:
        value = _value(config, key)
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            yield Problem(key, value, "must be a number greater than 0", f"{key}=1")
    if config.sweep.tasks is not None and config.sweep.tasks <= 0:
        yield Problem("sweep.tasks", config.sweep.tasks, "must be greater than 0", "sweep.tasks=4")
    dp = config.parallelism.dp
    if dp is not None and dp <= 0:
        yield Problem("parallelism.dp", dp, "must be greater than 0", "parallelism.dp=1")


def paths(config: Config) -> Iterator[Problem]:
    """Files and folders that must exist before anything is submitted."""
    data, cluster, train = config.data, config.cluster, config.train
    if data.name == "text" and data.path is None:
        yield Problem("data.path", None, "must be given with data=text", "data.path=README.md")
    yield from token_problems(data)
    if data.name != "tokens" and data.path is not None and not _has_file(data.path):
        yield Problem("data.path", data.path, "is or holds no file on this machine", "data=stdlib")
    if cluster.calibration not in ("auto", "off") and not Path(cluster.calibration).expanduser().is_file():
        yield Problem("cluster.calibration", cluster.calibration, "is no file", "cluster.calibration=auto")
    if train.resume_from is not None and newest(Path(train.resume_from).expanduser()) is None:
        rule = "is no checkpoints folder of a run, or holds no whole checkpoint"
        if any(Path(train.resume_from).expanduser().glob("**/.metadata")):
            rule += f": a folder with a .metadata and no {SIDECAR} is of an earlier version, and would be unpickled"
        yield Problem("train.resume_from", train.resume_from, rule, "train.resume_from=null")
    if config.tracking.name != "none" and find_spec("wandb") is None:
        rule = "needs the wandb package: pip install wandb"
        yield Problem("tracking", config.tracking.name, rule, "tracking=none")
    if cluster.scheduler == "slurm" and not _has_template(config):
        folders = ", ".join(str(path.parent) for path in batch_templates("x"))
        rule = f"must name a batch script in {folders}: without one {cluster.name} is for task=plan alone"
        yield Problem("cluster.template", cluster.template, rule, "cluster.template=generic.sbatch, or task=plan")
    if cluster.scheduler == "pbs" and config.task.name != "plan":
        rule = f"jobs are submitted to Slurm or run on this machine: {cluster.name} is for task=plan alone"
        yield Problem("cluster.scheduler", "pbs", rule, "task=plan")
    if cluster.accelerator is not None and not (ACCELERATORS / f"{cluster.accelerator}.yaml").is_file():
        found = ", ".join(sorted(path.stem for path in ACCELERATORS.glob("*.yaml")))
        yield Problem("cluster.accelerator", cluster.accelerator, f"must be one of {found}", "cluster.accelerator=h100")


def _has_template(config: Config) -> bool:
    """Whether the batch script's template is there, or nothing is submitted."""
    template = config.cluster.template
    if template is None:
        return config.task.name == "plan"
    return batch_template(template) is not None


def _has_file(pattern: str) -> bool:
    """True for a file, a folder with one below it, or a glob that matches one."""
    root = Path(pattern).expanduser()
    found = root.rglob("*") if root.is_dir() else map(Path, iglob(str(root), recursive=True))
    return any(path.is_file() for path in found)


def racks(config: Config) -> Iterator[Problem]:
    """The rack of every node, or the domains of a uniform machine, where they are given."""
    cluster = config.cluster
    if cluster.topology is not None:
        yield from _topology(cluster)
    for tier, link in (cluster.data_sheet.links if cluster.data_sheet else {}).items():
        if tier not in TIERS:
            works = "cluster.data_sheet.links.node.bytes_per_s=1e11"
            yield Problem(f"cluster.data_sheet.links.{tier}", tier, f"must be one of {', '.join(TIERS)}", works)
        for fact, at_least in (("latency_s", 0), ("bytes_per_s", 1)):
            value = getattr(link, fact)
            if value is not None and value < at_least:
                key = f"cluster.data_sheet.links.{tier}.{fact}"
                yield Problem(key, value, f"must be at least {at_least}", f"{key}={max(at_least, 1e-5)}")
    if cluster.racks is not None and len(cluster.racks) != cluster.nodes:
        rule = f"must name the rack of each of the {cluster.nodes} nodes"
        yield Problem("cluster.racks", list(cluster.racks), rule, f"cluster.racks={[0] * cluster.nodes}")


def _topology(cluster: ClusterConfig) -> Iterator[Problem]:
    topology = cluster.topology
    assert topology is not None
    for key, value in vars(topology).items():
        if value is not None and value < 1:
            yield Problem(f"cluster.topology.{key}", value, "must be at least 1", f"cluster.topology.{key}=1")
            return
    pair, switch, rack = topology.ranks_per_pair, topology.nodes_per_switch, topology.nodes_per_rack
    if pair and cluster.ranks_per_node % pair:
        rule = f"must divide cluster.ranks_per_node = {cluster.ranks_per_node}"
        yield Problem("cluster.topology.ranks_per_pair", pair, rule, "cluster.topology.ranks_per_pair=null")
    if switch and rack and rack % switch:
        rule = f"must be a multiple of cluster.topology.nodes_per_switch = {switch}"
        works = f"cluster.topology.nodes_per_rack={-(-rack // switch) * switch}"
        yield Problem("cluster.topology.nodes_per_rack", rack, rule, works)


def task(config: Config, spec: ModelSpec) -> Iterator[Problem]:
    """What one task asks for and another does not."""
    if config.task.name in ("train", "profile") and config.data.name == "tokens":
        for folder, _ in token_sources(config.data):
            index = TokenIndex.of_whole(folder)
            if index.max_id >= spec.vocab:
                rule = f"{folder} has ids up to {index.max_id}, of a tokenizer with {index.vocab}"
                yield Problem("model.vocab", spec.vocab, rule, f"model.vocab={index.vocab}")
            if index.tokens <= config.train.sequence:
                yield too_short(folder, index.tokens, config.train.sequence)
    elif config.task.name in ("train", "profile") and spec.vocab < BYTES:
        rule = f"text is read as bytes: at least {BYTES}"
        yield Problem("model.vocab", spec.vocab, rule, f"model.vocab={BYTES}")
    ranks = config.cluster.nodes * config.cluster.ranks_per_node
    least = 2 * (ranks + 2)
    if config.train.checkpoint_inodes < least:
        rule = f"two checkpoints of {ranks} ranks, one whole and one under way, are {least} files and folders"
        yield Problem(
            "train.checkpoint_inodes", config.train.checkpoint_inodes, rule, f"train.checkpoint_inodes={least}"
        )
    for count in config.task.ranks or ():
        if not 0 < count <= ranks:
            rule = f"must lie between 1 and cluster.nodes * cluster.ranks_per_node = {ranks}"
            yield Problem("task.ranks", count, rule, f"task.ranks=[{ranks}]")
    if config.task.name == "profile" and not config.train.timing:
        yield Problem("train.timing", False, "task=profile shows where time went", "train.timing=true")
    if config.task.name == "microbench":
        yield from _microbench(config, spec, ranks)


def _microbench(config: Config, spec: ModelSpec, ranks: int) -> Iterator[Problem]:
    asked = config.task
    if config.train.dtype == "float64":
        rule = "the grouped GEMM that is measured has no float64"
        yield Problem("train.dtype", config.train.dtype, rule, "train.dtype=float32")
    unknown = [suite for suite in asked.suites if suite not in SUITES]
    if unknown or not asked.suites:
        rule = f"must be some of {', '.join(SUITES)}"
        yield Problem("task.suites", list(asked.suites), rule, "task.suites=[gemm,p2p,all_to_all]")
    if asked.backend == "mpi" and find_spec("mpi4py") is None:
        rule = "needs the mpi4py package and an MPI library: pip install 'piper-hpc[mpi]', or the site's own build"
        yield Problem("task.backend", "mpi", rule, "task.backend=torch")
    if asked.backend == "mpi" and config.cluster.scheduler == "local" and ranks > 1:
        rule = "ranks on this machine are started without MPI's launcher, so that MPI would see each of them alone"
        yield Problem("task.backend", "mpi", rule, "cluster=testbed +cluster.environment.SLURM_MPI_TYPE=pmi2")
    added_up = [suite for suite in asked.suites if suite in ("all_reduce", "reduce_scatter")]
    if asked.backend == "mpi" and added_up and config.train.dtype == "bfloat16":
        yield Problem("train.dtype", "bfloat16", f"MPI cannot add it up ({', '.join(added_up)})", "train.dtype=float32")
    if "dispatch" in asked.suites and (not spec.experts or spec.experts % ranks):
        rule = f"the dispatch suite needs model.experts (here {spec.experts}) to divide over the {ranks} ranks"
        yield Problem("task.suites", list(asked.suites), rule, f"model.experts={max(1, spec.experts // ranks) * ranks}")
    if "grouped_gemm" in asked.suites and spec.experts and config.train.dtype != "float64":
        yield from executor.grouped_gemm_rows(spec, config.train.dtype)


def train(config: TrainConfig) -> Iterator[Problem]:
    """Optimizer settings in their domain."""
    if config.sequence < 2:
        yield Problem("train.sequence", config.sequence, "must be at least 2 tokens", "train.sequence=128")
    never_negative = ("warmup_steps", "checkpoint_every", "checkpoint_keep", "checkpoint_keep_every")
    for key in (*never_negative, "weight_decay", "seed"):
        if getattr(config, key) < 0:
            yield Problem(f"train.{key}", getattr(config, key), "must not be negative", f"train.{key}=0")
    if config.checkpoint_min is not None and config.checkpoint_min < 0:
        yield Problem("train.checkpoint_min", config.checkpoint_min, "must not be negative", "train.checkpoint_min=30")
    highest, lowest = config.learning_rate, config.minimum_learning_rate
    if config.lr_schedule == "cosine" and highest > 0 and not 0 <= lowest < highest:
        rule = f"a cosine ends below train.learning_rate = {highest:g}; train.lr_schedule=constant holds that rate"
        works = f"train.minimum_learning_rate={highest / 10:g}"
        yield Problem("train.minimum_learning_rate", lowest, rule, works)
    for key, usual in (("beta1", 0.9), ("beta2", 0.95)):
        if not 0 <= getattr(config, key) < 1:
            yield Problem(f"train.{key}", getattr(config, key), "must lie in [0, 1)", f"train.{key}={usual}")


def resume(config: TrainConfig, spec: ModelSpec) -> Iterator[Problem]:
    """Facts that a checkpoint fixes for the run that goes on from it."""
    found = None if config.resume_from is None else newest(Path(config.resume_from).expanduser())
    if found is not None:
        yield from Sidecar.read(found).origin.disagreements(spec, seed=config.seed, dtype=config.dtype)


def plan(config: Config) -> Iterator[Problem]:
    """What a plan keeps free, and the sequence that it takes from the model."""
    headroom, sequence = config.plan.memory_headroom, config.model.sequence
    if not 0 <= headroom < 1:
        rule = "must lie in [0, 1): the share of a rank's memory that a layout leaves free"
        yield Problem("plan.memory_headroom", headroom, rule, "plan.memory_headroom=0.08")
    if config.plan.export_file is not None and config.plan.export is None:
        rule = "needs plan.export, the project that the file is for"
        works = f"plan.export={EXPORTS[0]} plan.export_file={config.plan.export_file}"
        yield Problem("plan.export_file", config.plan.export_file, rule, works)
    if sequence is not None and sequence < 2:
        yield Problem("model.sequence", sequence, "must be at least 2 tokens", "model.sequence=4096")


def routing(config: Config, spec: ModelSpec) -> Iterator[Problem]:
    """What predictions assume of the router, and what the executor has of it."""
    asked = config.train.routing
    if asked.skew < 1:
        rule = "must be at least 1, the load of every rank where routing is balanced"
        yield Problem("train.routing.skew", asked.skew, rule, "train.routing.skew=1.5")
    if asked.capacity_factor <= 0:
        rule = "must be above 0"
        yield Problem(
            "train.routing.capacity_factor", asked.capacity_factor, rule, "train.routing.capacity_factor=1.25"
        )
    shares = asked.histogram
    if shares is not None and (len(shares) != spec.experts or min(shares, default=0) < 0 or sum(shares) <= 0):
        rule = f"must have a share for each of model.experts = {spec.experts}, none negative and not all 0"
        yield Problem("train.routing.histogram", shares, rule, "train.routing.histogram=null")
    if config.task.name in ("train", "profile") and asked.mode != "dropless":
        rule = "the executor drops no token and forces none"
        yield Problem("train.routing.mode", asked.mode, rule, "train.routing.mode=dropless")


def replicas(config: Config) -> int:
    """`parallelism.dp`, or what pp and ep leave of the ranks."""
    if config.parallelism.dp is not None:
        return config.parallelism.dp
    ranks = config.cluster.nodes * config.cluster.ranks_per_node
    return max(1, ranks // (config.parallelism.pp * config.parallelism.ep * config.parallelism.etp))


NO_DEGREES = ("auto", "dp", "migration", "migration_every", "migration_threshold")
"""Keys of `parallelism` that a Layout does not have."""


def layout_of(config: Config) -> Layout:
    """The layout that `parallelism` asks for, checked or not."""
    degrees = {key: value for key, value in vars(config.parallelism).items() if key not in NO_DEGREES}
    degrees["stage_layers"] = tuple(degrees["stage_layers"] or ())
    return Layout(dp=replicas(config), **degrees)


def layout(config: Config, spec: ModelSpec) -> Iterator[Problem]:
    """Eq 7-9 of arXiv 2605.05049, the batch, the racks, and the pipeline's own rules."""
    p, cluster, batch = config.parallelism, config.cluster, config.train.global_batch
    ranks = cluster.nodes * cluster.ranks_per_node
    dp = replicas(config)
    product = p.pp * dp * p.ep * p.etp
    if product != ranks:
        rule = (
            f"pp * dp * ep * etp = {p.pp} * {dp} * {p.ep} * {p.etp} = {product} must equal the ranks, "
            f"cluster.nodes * cluster.ranks_per_node = {cluster.nodes} * {cluster.ranks_per_node} = {ranks}"
        )
        per_node, left = divmod(product, cluster.nodes)
        works = (
            f"cluster.ranks_per_node={per_node}" if not left else f"cluster.nodes=1 cluster.ranks_per_node={product}"
        )
        yield Problem("parallelism", f"pp={p.pp} ep={p.ep} dp={dp}", rule, works)
        return
    asked = layout_of(config)
    if asked.schedule == AUTO:  # what each schedule asks for is seen when one is chosen
        asked = replace(asked, schedule="1f1b", vpp=1, stage_layers=())
    problems = list(layout_problems(spec, asked, Workload(batch, config.train.sequence)))
    yield from problems or executor.missing_of_layout(asked, spec)
    yield from _migration(config)


def _migration(config: Config) -> Iterator[Problem]:
    asked, cluster = config.parallelism, config.cluster
    if asked.migration == OFF:
        return
    if asked.migration_threshold < 1:
        rule = "must be at least 1, the load of every rank where routing is balanced"
        yield Problem(
            "parallelism.migration_threshold", asked.migration_threshold, rule, "parallelism.migration_threshold=1.1"
        )
    if cluster.calibration == "off" and cluster.data_sheet is None and cluster.accelerator is None:
        rule = "weighs gain against cost, and cluster.calibration=off leaves nothing to price them by"
        yield Problem("parallelism.migration", asked.migration, rule, "parallelism.migration=off")
