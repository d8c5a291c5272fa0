"""What a TOML file of torchtitan's keys says: read by documented name, as torchtitan derives degrees from them."""

from __future__ import annotations

import json
import re
from typing import Any

from piper_hpc.planner.export.choice import Reading, shards
from piper_hpc.planner.export.torchtitan import RECIPES, SCHEDULES
from piper_hpc.planner.export.vocabulary import TORCHTITAN
from piper_hpc.spec import RECIPES as BYTES
from piper_hpc.spec import Layout, ModelSpec, Routing, Workload
from piper_hpc.spec.layout import split_layers


def keys(text: str) -> dict[str, Any]:
    """Values by `section.key`. ValueError for what torchtitan does not document, and for TOML other than lines of
    `key = value` whose values are JSON's too."""
    read: dict[str, Any] = {}
    section = ""
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if head := re.fullmatch(r"\[(\w+)\]", line):
            section = head[1]
            continue
        key, _, value = line.partition(" = ")
        name = f"{section}.{key}"
        if name in read:
            raise ValueError(f"{name} is there twice")
        read[name] = json.loads(value)
        TORCHTITAN.check(name, read[name])
    return read


def read(text: str, model: ModelSpec, ranks: int) -> Reading:
    """Layout and workload that the keys mean for `ranks` processes.

    ValueError for names or values that are not documented, or that do not fit each other, the ranks or the model.
    """
    given = keys(text)
    parallel = {
        name.removeprefix("parallelism."): value for name, value in given.items() if name.startswith("parallelism.")
    }
    replicate, shard = parallel["data_parallel_replicate_degree"], parallel["data_parallel_shard_degree"]
    tp, cp, pp = (parallel[f"{axis}_parallel_degree"] for axis in ("tensor", "context", "pipeline"))
    if replicate * shard * cp * tp * pp != ranks:
        raise ValueError(
            f"{replicate} * {shard} * {cp} * {tp} * {pp} data, context, tensor and stages: not {ranks} ranks"
        )
    ep = parallel.get("expert_parallel_degree", 1)
    # Without expert parallelism experts are split as all else.
    etp = (parallel["expert_tensor_parallel_degree"] if ep > 1 else tp) if model.experts else 1
    parts = parallel.get("module_fqns_per_model_part")
    micro_batch = parallel["pipeline_parallel_microbatch_size"] if pp > 1 else given["training.local_batch_size"]
    layout = Layout(
        pp=pp,
        vpp=len(parts) // pp if parts else 1,
        ep=ep,
        etp=etp,
        tp=tp,
        cp=cp,
        dp=ranks // (pp * ep * etp),
        schedule=_schedule(parallel) if pp > 1 else "1f1b",
        micro_batch=micro_batch,
        recompute=given["activation_checkpoint.mode"],
        stage_layers=_split(parts, model) if parts else (),
    )
    layout = Layout(**vars(layout) | {"zero": _zero(layout, parallel)})
    return Reading(layout, _workload(given))


def _schedule(parallel: dict[str, Any]) -> str:
    return {theirs: ours for ours, theirs in SCHEDULES.items()}[parallel["pipeline_parallel_schedule"]]


def _zero(layout: Layout, parallel: dict[str, Any]) -> int:
    """The stage that FSDP comes to; see `torchtitan.RESHARD`."""
    if parallel["data_parallel_replicate_degree"] > 1 or not shards(layout):
        return 0
    if layout.pp > 1:
        return {"never": 1}[parallel["fsdp_reshard_after_forward"]]
    return {"never": 2, "always": 3}[parallel["fsdp_reshard_after_forward"]]


def _split(parts: list[list[str]], model: ModelSpec) -> tuple[int, ...]:
    """Layers of each stage, where they are not as even as it goes."""
    expected = ["tok_embeddings", *(f"layers.{layer}" for layer in range(model.layers)), "norm", "output"]
    if [name for part in parts for name in part] != expected:
        raise ValueError("module_fqns_per_model_part: must name every module of the model once, in order")
    counts = tuple(sum(name.startswith("layers.") for name in part) for part in parts)
    even = tuple(len(layers) for layers in split_layers(model.layers, len(parts)))
    return () if counts == even else counts


def _workload(given: dict[str, Any]) -> Workload:
    precision = {key: given[f"training.{key}"] for key in ("dtype", "mixed_precision_param")}
    recipe = next(name for name, keys_of in RECIPES.items() if keys_of == precision)
    routing = Routing("forced" if given.get("debug.moe_force_load_balance") else "dropless")
    return Workload(given["training.global_batch_size"], given["training.seq_len"], BYTES[recipe], routing)
