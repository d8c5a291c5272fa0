"""The typed schema behind conf/: one dataclass a group. A key that is not here is an error."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class TaskConfig:
    """What to do: `train`, `microbench`, `profile` or `plan`."""

    name: str = MISSING
    budget_s: float = 18.0  # microbench: the calibration suite, and the measuring before a first training run
    suites: list[str] = field(default_factory=lambda: ["calibration"])  # microbench: see piper_hpc.config.checks.SUITES
    backend: str = "torch"  # microbench: torch (torch.distributed) or mpi (mpi4py) carries the exchange suites
    cell_s: float = 0.5  # microbench: seconds for one shape or size of a suite; what would take longer is left out
    resume: str | None = None  # microbench: an earlier run's id or folder; what it measured is taken over
    link_counters: str = "auto"  # microbench: the interface whose counter rows are held against, auto or off
    vendor: bool = True  # microbench: run nccl-tests, rccl-tests and OSU binaries that are on the PATH
    executor: str = "auto"  # plan: piper (this project's, measured), megatron (every axis) or auto (what fits)
    rank_by: str = "mfu"  # plan: mfu, tokens_per_s or memory
    ep_domain: str = "none"  # plan: how far Eq 10 lets an expert group reach: none (anywhere), switch or node
    candidates: int = 20  # plan: how many to print
    ranks: list[int] | None = None  # plan: how many ranks a layout may use; null: all of the cluster
    recipe: str | None = (
        None  # plan: bytes kept of every parameter (see spec.RECIPES); null: mixed_18, or what this project trains in
    )
    profile_steps: int = 3  # profile: traced steps, after two that warm up


@dataclass
class ModelConfig:
    """See piper_hpc.spec.ModelSpec, whose defaults hold where a key is null; `path` may give what the keys do not."""

    path: str | None = None  # a Hugging Face config.json (model=hf)
    name: str | None = None
    layers: int | None = None
    hidden: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None  # hidden / heads where not given; MLA: qk_nope_dim + qk_rope_dim
    experts: int | None = None
    top_k: int | None = None
    expert_ffn: int | None = None
    vocab: int | None = None
    matrices_per_expert: int | None = None
    attention: str | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_dim: int | None = None
    qk_rope_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | None = None
    full_attention_every: int | None = None
    window_kind: str | None = None
    dense_first: int | None = None
    moe_every: int | None = None
    dense_ffn: int | None = None
    dense_matrices: int | None = None
    dense_residual_ffn: int | None = None
    shared_experts: int | None = None
    shared_expert_ffn: int | None = None
    shared_expert_gate: bool | None = None
    expert_groups: int | None = None
    groups_per_token: int | None = None
    tied_embeddings: bool | None = None
    positions: int | None = None
    mtp_layers: int | None = None
    norm: str | None = None
    norms_per_layer: int | None = None
    qk_norm: str | None = None
    attention_bias: bool | None = None
    output_bias: bool | None = None
    ffn_bias: bool | None = None
    router_bias: bool | None = None
    head_bias: bool | None = None
    attention_sinks: bool | None = None
    encoder_parameters: int | None = None
    counting: str | None = None
    rope_theta: float | None = None
    norm_eps: float | None = None
    router_aux_coef: float | None = None


@dataclass
class ParallelismConfig:
    """See piper_hpc.spec.Layout. `dp` not given means what is left of the ranks. `auto` plans first."""

    auto: bool = False
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    tp: int = 1
    cp: int = 1
    dp: int | None = None
    zero: int = 0
    schedule: str = "1f1b"
    micro_batch: int = 1
    recompute: str = "none"
    all_to_all: str = "flat"
    placement: str = "linear"


@dataclass
class AxesConfig:
    """What a plan searches, value by value; see piper_hpc.planner.Axes. conf/plan/default.yaml fills it."""

    pp: list[int] = field(default_factory=list)
    vpp: list[int] = field(default_factory=list)
    ep: list[int] = field(default_factory=list)
    etp: list[int] = field(default_factory=list)
    tp: list[int] = field(default_factory=list)
    cp: list[int] = field(default_factory=list)
    zero: list[int] = field(default_factory=list)
    schedule: list[str] = field(default_factory=list)
    micro_batch: list[int] = field(default_factory=list)
    recompute: list[str] = field(default_factory=list)
    all_to_all: list[str] = field(default_factory=list)
    placement: list[str] = field(default_factory=list)


@dataclass
class PlanConfig:
    """The search of task=plan and parallelism=auto.

    `save`: a name for the best plan that the executor has; `trace`: a file for the best plan's timeline.
    """

    save: str | None = None
    trace: str | None = None
    axes: AxesConfig = field(default_factory=AxesConfig)


@dataclass
class LinkConfig:
    """A data sheet's link, of one rank while all of its node send, one way; null where not public."""

    latency_s: float | None = None
    bytes_per_s: float | None = None


@dataclass
class DataSheetConfig:
    """What to predict with where nothing was measured; what is null comes from the accelerator, if it names one."""

    peak_flops: float | None = None
    gemm_efficiency: float | None = None  # the best measured matrix product over the peak where null
    memory_bytes_per_s: float | None = None
    host_op_s: float | None = None  # not known: launches are charged nothing, and the prediction says so
    links: dict[str, LinkConfig] = field(default_factory=dict)  # by tier: pair, node, switch, rack, system


@dataclass
class TopologyConfig:
    """Domains of a uniform machine, near to far; null where it has none, or none is public. See spec.Topology."""

    ranks_per_pair: int | None = None  # devices of one module
    hosts_per_node: int = 1  # Slurm nodes that one scale-up link joins, which model and planner then call a node
    nodes_per_switch: int | None = None
    nodes_per_rack: int | None = None  # or dragonfly group, or cell
    nics_per_node: int | None = None  # of one host


@dataclass
class ClusterConfig:
    """Where to run. `scheduler` is `local` (this machine) or `slurm`."""

    name: str = MISSING
    checked: str | None = None  # when its facts were last compared with their sources
    scheduler: str = "local"
    nodes: int = 1
    ranks_per_node: int = 1
    racks: list[int] | None = None  # rack of each node, in place of `topology`; all in one where neither is given
    topology: TopologyConfig | None = None
    switches: dict[str, str] = field(
        default_factory=dict
    )  # leaf switch -> its nodes, where Slurm does not tell: n[1-4]
    domains: str = "auto"  # parallelism.placement=pack: auto (Slurm or this file) or measured (timed between nodes)
    max_switches: int | None = (
        None  # pack: the most leaf switches to be spread over; null: the fewest that hold the job
    )
    switch_wait_min: int = 60  # pack: how long Slurm may wait for so few
    device: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda (ROCm too) or xpu
    accelerator: str | None = None  # a file of conf/accelerator: what data sheets say of one device
    memory_gib_per_rank: float = 0.0  # 0: the accelerator's, else this machine's memory over its ranks
    quota: str = "auto"  # local: auto gives each rank a CPU quota where cgroups are writable; off
    template: str | None = None  # slurm: a file of sbatch_templates/
    partition: str | None = None
    account: str | None = None
    time_min: int = 30
    cpus_per_task: int = 1
    gpus_per_task: int = 0
    calibration: str = "auto"  # auto: cached, else measured in the job; a path; off: data sheet or no prediction
    data_sheet: DataSheetConfig | None = None
    sources: dict[str, str] = field(default_factory=dict)  # key -> where its value is from; `assumed...` says so
    environment: dict[str, str] = field(default_factory=dict)  # variables of every rank, beside the template's
    comm_timeout_s: float = 120.0


@dataclass
class DataConfig:
    """Text, read as bytes. `path` is a file, a folder or a glob; not given: the Python standard library's sources."""

    name: str = MISSING
    path: str | None = None
    cache: str = "${oc.env:XDG_CACHE_HOME,${oc.env:HOME,/tmp}/.cache}/piper_hpc"


@dataclass
class RoutingConfig:
    """What predictions assume of the router; see piper_hpc.spec.Routing. This project's executor drops nothing."""

    mode: str = "dropless"  # dropless, drop (each expert takes its capacity) or forced (balanced by force)
    skew: float = 1.0  # rows of the busiest rank of an expert group over the mean, 1 to ep
    capacity_factor: float = 1.0  # drop: capacity over the mean load
    histogram: list[float] | None = None  # share of copies that each expert draws, as measured; goes before skew


@dataclass
class TrainConfig:
    """See piper_hpc.train.settings.TrainSettings. `global_batch` and `sequence` never depend on the layout."""

    steps: int = MISSING
    seed: int = 0
    global_batch: int = MISSING
    sequence: int = MISSING
    learning_rate: float = 3e-3
    minimum_learning_rate: float = 3e-4
    lr_schedule: str = "cosine"  # cosine or constant
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    dtype: str = "float32"
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    checkpoint_every: int = 0  # steps; 0: none on the way
    checkpoint_last: bool = False  # also after the last step
    resume_from: str | None = None  # the checkpoints folder of a run, of any layout


@dataclass
class TrackingConfig:
    """Views of the record beside it: none, wandb_offline or wandb."""

    name: str = MISSING
    project: str = "piper_hpc"
    entity: str | None = None


@dataclass
class Config:
    """The whole configuration."""

    task: TaskConfig = MISSING
    model: ModelConfig = MISSING
    parallelism: ParallelismConfig = MISSING
    plan: PlanConfig = field(default_factory=PlanConfig)
    cluster: ClusterConfig = MISSING
    data: DataConfig = MISSING
    train: TrainConfig = MISSING
    tracking: TrackingConfig = MISSING
    runs: str = "runs"  # where runs are kept
    dry_run: bool = False  # print what would be submitted, submit nothing
    submit: bool = True  # false: prepare the run's folder, print its path (batch scripts run by hand)
    wait: bool = True  # false: return the run id at once
    format: str = "text"  # text or json


def register() -> None:
    """Make the schema known to Hydra as `schema`, the base that conf/config.yaml fills."""
    ConfigStore.instance().store(name="schema", node=Config)
