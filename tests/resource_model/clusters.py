"""Models and made-up clusters whose curves are simple enough to predict by hand."""

from __future__ import annotations

from dataclasses import replace

from piper_hpc.spec import Calibration, ClusterSpec, Curve, ModelSpec

TINY = ModelSpec(
    name="tiny",
    layers=4,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    experts=8,
    top_k=2,
    expert_ffn=128,
    vocab=256,
)
WIDE = replace(TINY, name="wide", layers=6, hidden=256, heads=8, kv_heads=8, experts=4, top_k=1, matrices_per_expert=2)

UNITS = {
    "gemm": ("flops", 50e9),
    "grouped_gemm/64": ("flops", 40e9),
    "attention_forward": ("flops", 20e9),
    "attention_backward": ("flops", 10e9),
    "elementwise": ("bytes", 10e9),
    "activation": ("bytes", 4e9),
    "router": ("values", 1e8),
    "dispatch_rows": ("bytes", 2e9),
    "combine_rows": ("bytes", 1e9),
    "gather": ("bytes", 1e10),
    "sort": ("values", 1e8),
    "norm": ("bytes", 0.5e9),
    "adamw": ("parameters", 0.3e9),
    "host_op": ("operations", 2e5),
    "p2p/node": ("bytes", 2e9),
    "p2p/rack": ("bytes", 1e9),
    "p2p/system": ("bytes", 0.5e9),
    "all_to_all/node/2": ("bytes", 1e9),
    "all_to_all/rack/4": ("bytes", 0.5e9),
    "idle/all_to_all/node/2": ("bytes", 2e9),
    "idle/all_to_all/rack/4": ("bytes", 1e9),
    "all_reduce/node/2": ("bytes", 0.8e9),
    "all_reduce/rack/4": ("bytes", 0.4e9),
    "all_reduce/system/8": ("bytes", 0.2e9),
    "skew/node/2": ("seconds", 4.0),
    "skew/rack/4": ("seconds", 2.0),
    "overhead/node": ("bytes", 8e9),
    "overhead/rack": ("bytes", 4e9),
}
"""operator -> (unit, units of work per second)"""


def line(name: str, latency_s: float = 1e-5, spread: float = 0.1) -> Curve:
    """latency + work / rate at points a factor ten apart; work in seconds begins at a microsecond."""
    unit, rate = UNITS[name]
    work = tuple(10.0**power for power in (range(-6, 1) if unit == "seconds" else range(0, 13)))
    return Curve(name, unit, work, tuple(latency_s + w / rate for w in work), (spread,) * len(work))


def calibration(*without: str) -> Calibration:
    """Every curve of UNITS but those named."""
    curves = {name: line(name) for name in UNITS if name not in without}
    return Calibration("made up", "2026-01-01T00:00:00+00:00", 50e9, curves)


def slower(given: Calibration, name: str, factor: float = 2.0) -> Calibration:
    """The same with one curve's seconds multiplied."""
    curve = given.curves[name]
    changed = replace(curve, seconds=tuple(seconds * factor for seconds in curve.seconds))
    return replace(given, curves=given.curves | {name: changed})


def cluster(given: Calibration | None = None, *, nodes: int = 4, ranks_per_node: int = 2) -> ClusterSpec:
    """Two racks of two nodes of two ranks, each with a device of its own and 1 GiB."""
    racks = tuple(node * 2 // nodes for node in range(nodes))
    return ClusterSpec("made-up", nodes, ranks_per_node, racks, 2**30, given or calibration())
