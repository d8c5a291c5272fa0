"""Documented names of other projects' arguments: what is written is checked against them, and so is what is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

FLAG, WHOLE, REAL, TEXT, TEXTS, PARTS = "flag", "whole", "real", "text", "texts", "parts"
"""Kinds of value: none (it is there or not); an int; a float; a word; several words; several lists of words."""

KINDS: dict[str, Callable[[Any], bool]] = {
    FLAG: lambda value: isinstance(value, bool),
    WHOLE: lambda value: isinstance(value, int) and not isinstance(value, bool),
    REAL: lambda value: isinstance(value, float),
    TEXT: lambda value: isinstance(value, str),
    TEXTS: lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    PARTS: lambda value: isinstance(value, list) and all(KINDS[TEXTS](one) for one in value),
}


@dataclass(frozen=True)
class Vocabulary:
    """Names that a version of a project documents, of those that a layout, a workload or a model needs.

    names: name -> kind of its value, or the words that it takes. date: of the version; url: where they are documented.
    """

    project: str
    version: str
    date: str
    url: str
    names: Mapping[str, str | tuple[str, ...]]

    def check(self, name: str, value: Any) -> None:
        """Whether `name` is documented, and takes this value. ValueError where not."""
        if name not in self.names:
            raise ValueError(f"{name} is no name that {self.project} {self.version} documents and this project knows")
        kind = self.names[name]
        if isinstance(kind, str):
            fits = KINDS[kind](value)
        else:
            fits = set(value if isinstance(value, list) else [value]) <= set(kind)
        if not fits:
            raise ValueError(f"{name} = {value!r}: {self.project} {self.version} takes {kind}")


MEGATRON = Vocabulary(
    "Megatron-LM",
    "core_v0.19.0",
    "2026-08-19",
    "https://github.com/NVIDIA/Megatron-LM/blob/core_v0.19.0/megatron/training/arguments.py",
    {
        # The model.
        "num-layers": WHOLE,
        "hidden-size": WHOLE,
        "ffn-hidden-size": WHOLE,
        "num-attention-heads": WHOLE,
        "group-query-attention": FLAG,
        "num-query-groups": WHOLE,
        "kv-channels": WHOLE,
        "multi-latent-attention": FLAG,
        "q-lora-rank": WHOLE,
        "kv-lora-rank": WHOLE,
        "qk-head-dim": WHOLE,
        "qk-pos-emb-head-dim": WHOLE,
        "v-head-dim": WHOLE,
        "window-size": TEXT,
        "window-attn-skip-freq": WHOLE,
        "softmax-type": ("vanilla", "off-by-one", "learnable"),
        "swiglu": FLAG,
        "disable-bias-linear": FLAG,
        "add-qkv-bias": FLAG,
        "qk-layernorm": FLAG,
        "qk-l2-norm": FLAG,
        "normalization": ("LayerNorm", "RMSNorm"),
        "norm-epsilon": REAL,
        "position-embedding-type": ("learned_absolute", "rope", "yarn", "mrope", "relative", "none"),
        "rotary-base": WHOLE,
        "max-position-embeddings": WHOLE,
        "vocab-size": WHOLE,
        "untie-embeddings-and-output-weights": FLAG,
        "mtp-num-layers": WHOLE,
        "attention-dropout": REAL,
        "hidden-dropout": REAL,
        "num-experts": WHOLE,
        "moe-ffn-hidden-size": WHOLE,
        "moe-router-topk": WHOLE,
        "moe-layer-freq": TEXT,
        "moe-shared-expert-intermediate-size": WHOLE,
        "moe-shared-expert-gate": FLAG,
        "moe-router-num-groups": WHOLE,
        "moe-router-group-topk": WHOLE,
        "moe-aux-loss-coeff": REAL,
        "moe-grouped-gemm": FLAG,
        "moe-token-dispatcher-type": ("allgather", "alltoall", "flex"),
        "moe-expert-capacity-factor": REAL,
        "moe-pad-expert-input-to-capacity": FLAG,
        "moe-router-force-load-balancing": FLAG,
        # Batch.
        "seq-length": WHOLE,
        "micro-batch-size": WHOLE,
        "global-batch-size": WHOLE,
        # Parallelism.
        "tensor-model-parallel-size": WHOLE,
        "sequence-parallel": FLAG,
        "context-parallel-size": WHOLE,
        "pipeline-model-parallel-size": WHOLE,
        "num-virtual-stages-per-pipeline-rank": WHOLE,
        "pipeline-model-parallel-layout": TEXT,
        "expert-model-parallel-size": WHOLE,
        "expert-tensor-parallel-size": WHOLE,
        "use-distributed-optimizer": FLAG,
        "overlap-grad-reduce": FLAG,
        "overlap-param-gather": FLAG,
        "use-megatron-fsdp": FLAG,
        "data-parallel-sharding-strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
        "ckpt-format": ("torch", "torch_dist", "torch_dcp", "fsdp_dtensor"),
        "init-model-with-meta-device": FLAG,
        "no-gradient-accumulation-fusion": FLAG,
        # Memory and precision.
        "recompute-granularity": ("full", "selective"),
        "recompute-method": ("uniform", "block"),
        "recompute-num-layers": WHOLE,
        "recompute-modules": (
            *("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts", "gdn_norm_out"),
        ),
        "bf16": FLAG,
        "grad-reduce-in-bf16": FLAG,
        "fp8-format": ("e4m3", "hybrid"),
        "fp8-recipe": ("tensorwise", "delayed", "mxfp8", "blockwise", "custom"),
        "fp8-param-gather": FLAG,
        "use-precision-aware-optimizer": FLAG,
        "exp-avg-dtype": ("fp32", "fp16", "bf16", "fp8"),
        "exp-avg-sq-dtype": ("fp32", "fp16", "bf16", "fp8"),
        "cross-entropy-loss-fusion": FLAG,
    },
)
"""Arguments of the command line. Megatron-LM makes many of fields of `megatron/core/model_parallel_config.py`
and `megatron/core/transformer/transformer_config.py`."""

TORCHTITAN = Vocabulary(
    "torchtitan",
    "v0.2.2",
    "2026-02-20",
    "https://github.com/pytorch/torchtitan/blob/v0.2.2/torchtitan/config/job_config.py",
    {
        "model.name": TEXT,
        "model.flavor": TEXT,
        "training.seq_len": WHOLE,
        "training.local_batch_size": WHOLE,
        "training.global_batch_size": WHOLE,
        "training.dtype": ("bfloat16", "float32"),
        "training.mixed_precision_param": ("bfloat16", "float32"),
        "training.mixed_precision_reduce": ("float32",),
        "parallelism.data_parallel_replicate_degree": WHOLE,
        "parallelism.data_parallel_shard_degree": WHOLE,
        "parallelism.fsdp_reshard_after_forward": ("default", "always", "never"),
        "parallelism.tensor_parallel_degree": WHOLE,
        "parallelism.context_parallel_degree": WHOLE,
        "parallelism.expert_parallel_degree": WHOLE,
        "parallelism.expert_tensor_parallel_degree": WHOLE,
        "parallelism.expert_parallel_comm_backend": ("standard", "deepep"),
        "parallelism.pipeline_parallel_degree": WHOLE,
        "parallelism.pipeline_parallel_schedule": (
            *("1F1B", "Interleaved1F1B", "GPipe", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"),
        ),
        "parallelism.pipeline_parallel_microbatch_size": WHOLE,
        "parallelism.pipeline_parallel_expert_parallel_overlap": FLAG,
        "parallelism.module_fqns_per_model_part": PARTS,
        "activation_checkpoint.mode": ("selective", "full", "memory_budget", "none"),
        "debug.moe_force_load_balance": FLAG,
    },
)
"""Keys of the TOML file. Schedules are those of `torch.distributed.pipelining.schedules.get_schedule_class`."""
