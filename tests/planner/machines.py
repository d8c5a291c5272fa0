"""Made-up devices, clusters and models on which every axis matters and a search is small."""

from __future__ import annotations

from dataclasses import replace

from piper_hpc.planner import Axes
from piper_hpc.spec import (
    DATA_SHEET,
    RECIPES,
    Accelerator,
    Calibration,
    ClusterSpec,
    Efficiency,
    Link,
    ModelSpec,
    Topology,
    Workload,
)

DEVICE = Accelerator(
    name="made-up",
    peak_flops={"bfloat16": 1e14, "float32": 1e13},
    memory_bytes=2**30,
    memory_bytes_per_s=1e12,
    compute_units=16,
    efficiency=Efficiency(
        gemm=0.7,
        grouped_gemm=0.5,
        attention_forward=0.5,
        attention_backward=0.4,
        memory=0.8,
        gemm_edge=50.0,
        launch_s=5e-6,
        step_host_s=1e-3,
        link={"node": 0.8, "system": 0.9},
        spread={"gemm": 0.1, "model": 0.05},
    ),
)
LINKS = {
    "node": Link(2e-6, 2e11),
    "switch": Link(5e-6, 2e10),
    "system": Link(1e-5, 1e10),
}
MOE = ModelSpec(
    name="moe",
    layers=6,
    hidden=256,
    heads=8,
    kv_heads=4,
    head_dim=32,
    experts=16,
    top_k=4,
    expert_ffn=256,
    vocab=1024,
    dense_first=1,
    dense_ffn=512,
    shared_experts=1,
    shared_expert_ffn=256,
)
DENSE = replace(
    MOE, name="dense", dense_first=0, experts=0, top_k=0, expert_ffn=0, shared_experts=0, shared_expert_ffn=0
)
WORKLOAD = Workload(64, 512, RECIPES["mixed_18"])
SMALL = Axes(
    pp=(1, 2, 4),
    vpp=(1, 2),
    ep=(1, 2, 8, 16),
    etp=(1, 2),
    tp=(1, 2),
    cp=(1, 2),
    zero=(0, 1, 3),
    schedule=("1f1b", "interleaved", "dualpipev"),
    micro_batch=(1, 3, 4),
    recompute=("none", "full", "norm+moe"),
    all_to_all=("flat", "halo", "halo3_dedup"),
    placement=("linear", "strided"),
)


def cluster(ranks: int = 32, memory_bytes: int = 2**30) -> ClusterSpec:
    """Nodes of four, two nodes a switch."""
    return ClusterSpec(
        "made-up",
        ranks // 4,
        4,
        (0,) * (ranks // 4),
        memory_bytes,
        Calibration(DATA_SHEET, "", 1e14),
        topology=Topology(node=4, switch=8),
        links=LINKS,
        accelerator=DEVICE,
    )
