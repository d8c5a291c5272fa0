"""The typed schema behind conf/: one dataclass a group. A key that is not here is an error."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from piper_hpc.spec import ALGORITHMS


@dataclass
class TaskConfig:
    """What to do: `train`, `microbench`, `profile` or `plan`."""

    name: str = MISSING  # the option that was chosen
    budget_s: float = 18.0  # microbench: the calibration suite, and the measuring before a first training run
    suites: list[str] = field(
        default_factory=lambda: ["calibration"]
    )  # microbench: what to time; docs/measure.md has the names
    backend: str = "torch"  # microbench: torch (torch.distributed) or mpi (mpi4py) carries the exchange suites
    cell_s: float = 0.5  # microbench: seconds for one shape or size of a suite; what would take longer is left out
    resume: str | None = None  # microbench: an earlier run's id or folder; what it measured is taken over
    link_counters: str = "auto"  # microbench: the interface whose counter rows are held against, auto or off
    vendor: bool = True  # microbench: run nccl-tests, rccl-tests and OSU binaries that are on the PATH
    executor: str = "auto"  # plan: piper (what this project trains), megatron (every axis) or auto (by the axes)
    rank_by: str = "mfu"  # plan: mfu, tokens_per_s or memory
    ep_domain: str = "none"  # plan: how far Eq 10 lets an expert group reach: none (anywhere), switch or node
    candidates: int = 20  # plan: how many to print
    ranks: list[int] | None = None  # plan: how many ranks a layout may use; null: all of the cluster
    recipe: str | None = (
        None  # plan: bytes kept of a parameter (docs/plan.md); null: mixed_18, or what train.dtype keeps for piper
    )
    profile_steps: int = 3  # profile: traced steps, after two that warm up


@dataclass
class RopeScalingConfig:
    """See piper_hpc.spec.rope.RopeScaling: how rotary positions are stretched, as a released config.json says."""

    kind: str = MISSING  # yarn, llama3, linear, or longrope (planned alone)
    factor: float = MISSING  # how many times longer the context becomes
    original_positions: int = 0  # the context before; not needed where linear
    beta_fast: float = 32.0  # yarn: turns in the original context above which a frequency stays
    beta_slow: float = 1.0  # yarn: turns below which it is divided by the factor
    truncate: bool = True  # yarn: round the range between both to whole dimensions
    mscale: float = 0.0  # yarn: of cosine and sine; 0: none given
    mscale_all_dim: float = 0.0  # yarn: of cosine and sine, and of the scores of mla; 0: none given
    attention_factor: float = 0.0  # yarn: of cosine and sine; 0: follows from the others
    low_freq_factor: float = 1.0  # llama3: original context over the longest wavelength that is blended
    high_freq_factor: float = 4.0  # llama3: over the shortest


@dataclass
class ModelConfig:
    """See piper_hpc.spec.ModelSpec, whose defaults hold where a key is null; `path` may give what the keys do not."""

    path: str | None = None  # a Hugging Face config.json (model=hf)
    sequence: int | None = None  # tokens of a sequence in its pre-training; what task=plan takes (see config.workload)
    name: str | None = None  # what tables and records call it
    layers: int | None = None  # decoder layers, dense ones included
    hidden: int | None = None  # width of the residual stream
    heads: int | None = None  # query heads
    kv_heads: int | None = None  # key and value heads; fewer than heads: grouped-query attention
    head_dim: int | None = None  # hidden / heads where not given; MLA: qk_nope_dim + qk_rope_dim
    experts: int | None = None  # routed experts of an MoE layer; 0: a dense model
    top_k: int | None = None  # experts that each token is sent to
    expert_ffn: int | None = None  # inner width of one expert
    vocab: int | None = None  # rows of the embedding; text read as bytes needs 256
    matrices_per_expert: int | None = None  # 3 for SwiGLU, 2 for an expert without a gate
    attention: str | None = None  # gqa (multi-head where kv_heads = heads) or mla (low-rank query, key and value)
    q_lora_rank: int | None = None  # mla: rank of the query; 0: a full query
    kv_lora_rank: int | None = None  # mla: rank of the shared key and value
    qk_nope_dim: int | None = None  # mla: width of a query head without rotary position
    qk_rope_dim: int | None = None  # mla: width of a query head with rotary position
    v_head_dim: int | None = None  # mla: width of a value head
    sliding_window: int | None = None  # tokens that a query sees; 0: all
    full_attention_every: int | None = None  # n > 0: every n-th layer sees all tokens, despite sliding_window
    window_kind: str | None = None  # sliding, or chunked where a query sees its own chunk (Llama 4)
    dense_first: int | None = None  # leading layers with a dense feed-forward
    moe_every: int | None = None  # of the layers after those, every n-th has experts
    dense_ffn: int | None = None  # inner width of a dense feed-forward
    dense_matrices: int | None = None  # 3 for SwiGLU, 2 without a gate
    dense_residual_ffn: int | None = None  # inner width of a dense feed-forward beside the experts (Arctic)
    shared_experts: int | None = None  # experts that every token passes through
    shared_expert_ffn: int | None = None  # inner width of one shared expert
    shared_expert_gate: bool | None = None  # a hidden x 1 gate on the output of the shared experts (Qwen2-MoE)
    expert_groups: int | None = None  # groups of group-limited routing; 0: a token may go to any expert
    groups_per_token: int | None = None  # groups that a token may choose from
    tied_embeddings: bool | None = None  # the output projection is the embedding
    positions: int | None = None  # learned position embeddings; 0: none
    mtp_layers: int | None = None  # multi-token-prediction modules after the last layer
    norm: str | None = None  # rms, layer or layer_no_bias
    norms_per_layer: int | None = None  # norms around attention and feed-forward
    qk_norm: str | None = None  # none, head (one head's width), full (all heads' width) or l2 (no parameters)
    attention_bias: bool | None = None  # on query, key and value
    output_bias: bool | None = None  # on the output projection of attention
    ffn_bias: bool | None = None  # on every feed-forward
    router_bias: bool | None = None  # on the router
    head_bias: bool | None = None  # on the output projection of the model
    attention_sinks: bool | None = None  # one learned logit a head (gpt-oss)
    encoder_parameters: int | None = None  # of a vision encoder before the decoder: counted, its FLOPs are not modelled
    counting: str | None = None  # all, or paper: the size in print counts experts and 4 hidden^2 of attention alone
    rope_theta: float | None = None  # base of the rotary position embedding
    rope_fraction: float | None = None  # leading share of a head's width that it turns (GLM-4.5: 0.5)
    rope_interleaved: bool | None = None  # it turns neighbours (2i, 2i + 1) instead of (i, i + width / 2)
    rope_scaling: RopeScalingConfig | None = None  # how it is stretched to a longer context; null: not
    nope_every: int | None = None  # every n-th layer has no positions (Llama 4: 4); 0: all have
    temperature_floor: int | None = None  # positions after which queries of layers without positions grow; 0: never
    temperature_scale: float | None = None  # by how much they grow
    clip_qkv: float | None = None  # bound of queries, keys and values; 0: none
    activation: str | None = None  # silu, gelu, gelu_tanh, or auto: silu where there is a gate, gelu where not
    swiglu_limit: float | None = None  # bound of gate and up in the SwiGLU of gpt-oss; 0: plain SwiGLU
    norm_eps: float | None = None  # added to the variance in a norm
    router_score: str | None = None  # softmax, sigmoid, or sparsemixer (planned alone)
    normalised_weights: bool | None = None  # divide the weights of a token's experts by their sum
    routed_scale: float | None = None  # what these weights are multiplied by
    selection_bias: bool | None = None  # balance by a bias on the choice of experts (DeepSeek-V3)
    selection_bias_rate: float | None = None  # by how much it moves after a step
    weighted_input: bool | None = None  # scale what experts are given, not what they return (Llama 4; top_k=1)
    fp32_gate: bool | None = None  # compute the router's product in float32 whatever the type
    router_aux: str | None = None  # load-balancing loss by sequence, or by global_batch
    router_aux_coef: float | None = None  # weight of the load-balancing loss
    router_z_coef: float | None = None  # weight of the router's z-loss


@dataclass
class ParallelismConfig:
    """See piper_hpc.spec.Layout. `dp` not given means what is left of the ranks. `auto` plans first."""

    auto: bool = False  # true: plan first, then train the best layout that the executor has
    pp: int = 1  # pipeline stages
    vpp: int = 1  # chunks of layers a rank holds (interleaved and V-shaped schedules)
    ep: int = 1  # ranks over which the experts of a layer are spread; must divide model.experts
    etp: int = 1  # ranks over which one expert is split (expert tensor parallelism)
    tp: int = 1  # tensor parallelism of everything but the experts
    cp: int = 1  # context parallelism: ranks over which a sequence is split
    dp: int | None = None  # replicas of an expert; null: ranks / (pp * ep * etp)
    zero: int = 0  # ZeRO stage: 0, 1 optimizer states, 2 and gradients, 3 and weights are sharded
    schedule: str = "1f1b"  # of the pipeline, see plan.axes.schedule; auto: the one predicted fastest
    micro_batch: int = 1  # sequences of one micro-batch on one rank
    recompute: str = "none"  # none, full, or parts joined by +: norm, activation, mla_up, moe, attention
    all_to_all: str = "flat"  # of dispatch and combine, see plan.axes.all_to_all and docs/all_to_all.md; or auto
    placement: str = (
        "linear"  # linear (ranks in node order) or pack (expert groups below one switch); plans: strided too
    )
    migration: str = "off"  # of experts between ranks as loads change: off, auto (lpt), or a planner, lpt or swap
    migration_every: int = 8  # steps between looks at the loads, and of the window that a plan is made from
    migration_threshold: float = 1.1  # busiest rank over the mean below which no expert moves
    stage_layers: list[int] | None = None  # layers of each pipeline stage, [3,4,4,3]; null: as even as it goes
    overlap_shared: bool = True  # shared experts run while routed rows are on their way


@dataclass
class AxesConfig:
    """What a plan searches, value by value; see piper_hpc.planner.Axes. conf/plan/default.yaml fills all of it but
    all_to_all, which has every algorithm that there is."""

    pp: list[int] = field(default_factory=list)  # pipeline stages
    vpp: list[int] = field(default_factory=list)  # chunks a rank
    ep: list[int] = field(default_factory=list)  # ranks over which experts are spread
    etp: list[int] = field(default_factory=list)  # ranks over which one expert is split
    tp: list[int] = field(default_factory=list)  # tensor parallelism
    cp: list[int] = field(default_factory=list)  # context parallelism
    zero: list[int] = field(default_factory=list)  # ZeRO stages
    schedule: list[str] = field(default_factory=list)  # pipeline schedules
    micro_batch: list[int] = field(default_factory=list)  # sequences a micro-batch
    recompute: list[str] = field(default_factory=list)  # what is computed again in the backward pass
    all_to_all: list[str] = field(default_factory=lambda: list(ALGORITHMS))  # algorithms of dispatch and combine
    placement: list[str] = field(default_factory=list)  # linear or strided order of ranks


@dataclass
class PlanConfig:
    """The search of task=plan and parallelism=auto; conf/plan/default.yaml fills it."""

    save: str | None = None  # a name: the best plan that the executor can train becomes parallelism=NAME
    trace: str | None = None  # a file: the best plan's simulated timeline, for Perfetto
    export: str | None = None  # megatron or torchtitan: the best plan as that project's own arguments
    export_file: str | None = None  # where to; null: megatron.sh or torchtitan.toml
    memory_headroom: float = 0.0  # share of a rank's memory that a layout leaves free: allocator, communicator buffers
    shades: bool = False  # print every candidate, and not only the best of each (pp, ep, tp, cp)
    axes: AxesConfig = field(default_factory=AxesConfig)


@dataclass
class LinkConfig:
    """A data sheet's link, of one rank while all of its node send, one way; null where not public."""

    latency_s: float | None = None  # of one message
    bytes_per_s: float | None = None  # of one rank


@dataclass
class DataSheetConfig:
    """What to predict with where nothing was measured; what is null comes from the accelerator, if it names one."""

    peak_flops: float | None = None  # FLOP/s of one device in the type that is trained in
    gemm_efficiency: float | None = None  # share of the peak that a product reaches; null: the best measured one
    memory_bytes_per_s: float | None = None  # of the memory of one device
    host_op_s: float | None = (
        None  # seconds to launch one operation; null: launches cost nothing, and the prediction says so
    )
    links: dict[str, LinkConfig] = field(default_factory=dict)  # by tier: pair, node, switch, rack, system


@dataclass
class TopologyConfig:
    """Domains of a uniform machine, near to far; null where it has none, or none is public. See spec.Topology."""

    ranks_per_pair: int | None = None  # devices of one module
    hosts_per_node: int = 1  # Slurm nodes that one scale-up link joins, which model and planner then call a node
    nodes_per_switch: int | None = None  # nodes below one leaf switch
    nodes_per_rack: int | None = None  # nodes of one rack, dragonfly group or cell
    nics_per_node: int | None = None  # network cards of one host


@dataclass
class LimitConfig:
    """Up to how many nodes a job may last how long, and the QOS that it needs for that."""

    nodes: int = MISSING  # the most of this bin
    time_min: int = MISSING  # the longest time limit
    qos: str | None = None  # what the site asks for; null: none


@dataclass
class ClusterConfig:
    """Where to run. `scheduler` is `local` (this machine), `slurm`, or `pbs`, for which plans alone are made."""

    name: str = MISSING  # what tables, records and calibrations call it
    checked: str | None = None  # when its facts were last compared with their sources
    scheduler: str = "local"  # local (this machine), slurm, or pbs: to plan for, as nothing is submitted to it
    nodes: int = 1  # hosts of the job
    ranks_per_node: int = 1  # ranks on each of them, one a device
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
    fabric: str | None = None  # of its nodes: cxi (Slingshot), ib or socket; a run that used another says so at its end
    device: str = "auto"  # auto (cuda where there is one, else cpu), cpu, cuda (ROCm too) or xpu
    accelerator: str | None = None  # a file of conf/accelerator: what data sheets say of one device
    memory_gib_per_rank: float = 0.0  # 0: the accelerator's, else this machine's memory over its ranks
    quota: str = "auto"  # local: auto gives each rank a CPU quota where cgroups are writable; off
    template: str | None = None  # slurm: a file of sbatch_templates/, or an absolute path
    partition: str | None = None  # slurm: --partition
    account: str | None = None  # slurm: --account
    time_min: int = 30  # slurm: time limit in minutes
    wants: list[str] = field(default_factory=list)  # keys of this group that the site asks its users for: account
    limits: list[LimitConfig] = field(default_factory=list)  # the site's own, by nodes of the job, fewest first
    jobs_queued: int | None = None  # the most that the site lets a user have in the queue
    jobs_running: int | None = None  # of them, those that run or may start at once
    cpus_per_task: int = 1  # cores of one rank, and its torch threads
    gpus_per_task: int = (
        0  # slurm: --gpus-per-task; a task sees its devices alone, which at some sites breaks peer access
    )
    gpus_per_node: int = 0  # slurm: --gpus-per-node; every task sees all, and takes that of its local rank
    qos: str | None = None  # slurm: --qos
    constraint: str | None = None  # slurm: --constraint
    mem: str | None = None  # slurm: --mem, of a node: 450G, or 0 for all of it
    gres: str | None = None  # slurm: --gres, where a site asks for devices so: gpu:4
    exclude: str | None = None  # slurm: --exclude
    reservation: str | None = None  # slurm: --reservation
    requeue: bool | None = None  # slurm: --requeue or --no-requeue; null: as cluster.go_on needs it
    go_on: str = "requeue"  # slurm: how a run that is cut off goes on: requeue, chain (a job that follows it) or off
    leave_margin_s: float = 30.0  # slurm: how long before its time limit a job has saved and left
    sbatch: dict[str, str | None] = field(default_factory=dict)  # slurm: any other option; null: one without a value
    modules: list[str] = field(default_factory=list)  # slurm: loaded before the ranks start, in this order
    container: str | None = None  # slurm: words before the ranks' command: apptainer exec --nv image.sif
    calibration: str = "auto"  # auto: cached, else measured in the job; a path; off: data sheet or no prediction
    data_sheet: DataSheetConfig | None = None
    sources: dict[str, str] = field(default_factory=dict)  # key -> where its value is from; `assumed...` says so
    environment: dict[str, str] = field(default_factory=dict)  # variables of every rank, beside the template's
    comm_timeout_s: float = 120.0  # how long a rank waits for its peers before it fails


@dataclass
class SourceConfig:
    """One of several folders of tokens, which give samples in the ratio of their weights."""

    path: str = MISSING  # a folder that piper_hpc.prepare wrote
    weight: float = 1.0  # its share of the samples, over the sum of all weights


@dataclass
class DataConfig:
    """What is learnt: text, read as bytes, or tokens that `python -m piper_hpc.prepare` wrote. stdlib is the Python
    standard library's sources."""

    name: str = MISSING  # stdlib, text or tokens
    path: str | None = None  # text: a file, a folder or a glob; tokens: a folder of them
    sources: list[SourceConfig] = field(default_factory=list)  # tokens, in place of path: folders and their weights
    document_starts: str = "learn"  # tokens: learn or mask the first token of a document, from the one before it
    cache: str = "${oc.env:XDG_CACHE_HOME,${oc.env:HOME,/tmp}/.cache}/piper_hpc"  # folder of the bytes of all files


@dataclass
class RoutingConfig:
    """What predictions assume of the router; see piper_hpc.spec.Routing. This project's executor drops nothing."""

    mode: str = "dropless"  # dropless, drop (each expert takes its capacity) or forced (balanced by force)
    skew: float = 1.0  # rows of the busiest rank of an expert group over the mean, 1 to ep
    capacity_factor: float = 1.0  # drop: capacity over the mean load
    histogram: list[float] | None = None  # share of copies that each expert draws, as measured; goes before skew
    record: bool = False  # keep the counts of a run's micro-batches, at most 16 a step, in its folder: routed.npz
    workload: str | None = None  # W0 ... W7: which experts tokens of a run go to, whatever its router says, to measure


@dataclass
class TrainConfig:
    """See piper_hpc.train.settings.TrainSettings. `global_batch` and `sequence` never depend on the layout."""

    steps: int = MISSING  # optimizer steps
    seed: int = 0  # of weights and of the order of samples
    global_batch: int = MISSING  # sequences a step, over all ranks
    sequence: int = MISSING  # tokens a sequence
    learning_rate: float = 3e-3  # at its highest, after the warm-up
    minimum_learning_rate: float = 3e-4  # where the cosine ends
    lr_schedule: str = "cosine"  # cosine or constant
    warmup_steps: int = 10  # of linear growth
    weight_decay: float = 0.1  # of AdamW, on matrices
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of all gradients together
    dtype: str = "float32"  # float32, bfloat16 or float64
    timing: bool = True  # where every step's time went, by term and stage; false: its whole length alone
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    checkpoint_every: int = 0  # steps between checkpoints; 0: none by count
    checkpoint_min: float | None = None  # minutes between them; null: 30 on Slurm where checkpoint_every is 0; 0: none
    checkpoint_last: bool | None = None  # a checkpoint after the last step as well; null: on Slurm
    checkpoint_keep: int = 2  # how many whole checkpoints stay, the newest; 0: all
    checkpoint_keep_every: int = 0  # of the older ones those of every so many steps stay too; 0: none
    checkpoint_inodes: int = 100000  # the most files and folders of all checkpoints of a run; fewer are kept beyond it
    resume_from: str | None = None  # the checkpoints folder of a run, of any layout, or one checkpoint of it
    on_non_finite: str = "stop"  # a gradient that is no number: stop the run, or skip the step


@dataclass
class TrackingConfig:
    """Views of the record beside it: none, wandb_offline or wandb."""

    name: str = MISSING  # none, wandb_offline or wandb
    project: str = "piper_hpc"  # of wandb
    entity: str | None = None  # of wandb: the team


@dataclass
class SweepConfig:
    """Many points of one command; docs/sweeps.md tells how they run."""

    name: str = "grid"  # grid: what -m names; plan: the best layouts of a plan, on the same nodes
    top: int = 4  # plan: how many of the best layouts run
    tasks: int | None = None  # slurm: the most tasks of one job array; null: what the site's limits leave
    start_s: float = 900.0  # the longest from a point's start, or its last step, to the next sign of life without steps
    stall_s: float = 60.0  # a point without a step for this long, and for ten times the predicted step time, is ended
    refuse_memory: bool = True  # leave out points that are predicted not to fit the memory of a rank
    strict_code: bool = False  # run points again that another version of the code has run


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
    sweep: SweepConfig = field(default_factory=SweepConfig)
    runs: str = "runs"  # where runs are kept
    runs_mode: int = 700  # who may enter a run's folder: 700 its user, 750 also the group to read, 770 also to write
    dry_run: bool = False  # print what would be submitted, submit nothing
    submit: bool = True  # false: prepare the run's folder, print its path (batch scripts run by hand)
    wait: bool = True  # false: return the run id at once
    format: str = "text"  # text or json


def register() -> None:
    """Make the schema known to Hydra as `schema`, the base that conf/config.yaml fills."""
    ConfigStore.instance().store(name="schema", node=Config)
