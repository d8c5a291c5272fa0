"""What limits a plan and what would lift it: the best layout again, with one constraint relaxed at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from piper_hpc.planner.search_spec import MEMORY_RELAXATION, Engine, RankedLayout, SearchResult, SearchSpec, domain_tier
from piper_hpc.spec import IDLE, TIERS, Accelerator, Calibration, Curve, Layout, Link, Prediction, Tier

NODE = TIERS.index(Tier.NODE.value)
NEAR = TIERS[: NODE + 1]

KERNELS = ("gemm", "grouped_gemm", "attention_forward", "attention_backward")
LARGEST = 4
"""How many terms are named."""


def limits(
    engine: Engine,
    spec: SearchSpec,
    result: SearchResult,
    rescored: Sequence[RankedLayout],
    best: Prediction,
    memory_bytes: int,
) -> dict[str, Any]:
    """Largest terms, memory of the worst rank, the price of Eq 10, and by how much each relaxation speeds the step up.

    gain_pct: more tokens a second, in per cent. All but memory's and the batch's are of the same layout, so that a new
    search could only gain more; they compare closed forms. rescored: layouts with
    simulated step times, the best first.
    memory_bytes: of a rank, of which spec.cluster has what a plan's head-room leaves.
    """
    lifts = sorted(_lifts(engine, spec, result, rescored[0].layout), key=lambda lift: -float(lift["gain_pct"]))
    return {
        "largest_terms": [
            {"term": name, "time_s": seconds, "share": seconds / best.step_time_s}
            for name, seconds in sorted(best.terms.items(), key=lambda item: -item[1])[:LARGEST]
        ],
        "memory": _memory(best, memory_bytes),
        "lifts": lifts,
        "binding": lifts[0]["constraint"] if lifts and lifts[0]["gain_pct"] > 0 else None,
        "eq_10": _eq_10(engine, spec, rescored, best),
    }


def _memory(best: Prediction, memory_bytes: int) -> dict[str, Any]:
    stages = [sum(kinds) for kinds in zip(*best.memory.values(), strict=True)]
    worst = stages.index(max(stages))
    kinds = {kind: sizes[worst] for kind, sizes in best.memory.items()}
    largest = max(kinds, key=lambda kind: kinds[kind])
    return {
        "stage": worst,
        "rank": worst * (best.layout.ranks // best.layout.pp),
        "peak_bytes": stages[worst],
        "available_bytes": memory_bytes,
        "headroom_bytes": memory_bytes - stages[worst],
        "largest_kind": largest,
        "largest_kind_bytes": kinds[largest],
    }


def _eq_10(engine: Engine, spec: SearchSpec, rescored: Sequence[RankedLayout], best: Prediction) -> dict[str, Any]:
    """The preference with its price: what crossing costs, and what staying inside would."""
    domain = domain_tier(spec.cluster, "switch")
    in_domain = next(
        (candidate for candidate in rescored if engine.expert_tier(spec, candidate.layout) <= domain), None
    )
    crosses = in_domain is not rescored[0]
    all_to_all_s = best.terms["dispatch_s"] + best.terms["combine_s"]
    stays = in_domain if crosses else None
    return {
        "domain": TIERS[domain],
        "crosses": crosses,
        "all_to_all_s": all_to_all_s,
        "all_to_all_share": all_to_all_s / best.step_time_s,
        "inside": asdict(stays.layout) if stays else None,
        "inside_costs_pct": 100 * (stays.step_time_s / rescored[0].step_time_s - 1) if stays else None,
    }


def _lifts(engine: Engine, spec: SearchSpec, result: SearchResult, layout: Layout) -> Iterator[dict[str, Any]]:
    tokens = spec.workload.tokens

    def gain(constraint: str, change: str, ratio: float, other: Layout | None = None) -> dict[str, Any]:
        named = None if other is None else asdict(other)
        return {"constraint": constraint, "change": change, "gain_pct": 100 * (ratio - 1), "other_layout": named}

    first, with_more_memory = result.best[0], result.with_more_memory
    if with_more_memory is not None and spec.rank_by != "memory":
        more = with_more_memory.score < first.score
        ratio = first.step_time_s / with_more_memory.step_time_s if more else 1.0
        yield gain(
            "memory", f"{100 * (MEMORY_RELAXATION - 1):.0f} % more", ratio, with_more_memory.layout if more else None
        )
    rate = tokens / engine.step_time_s(spec, layout)
    for constraint, change, relaxed in _relaxed(spec):
        seconds = engine.step_time_s(relaxed, layout)
        yield gain(constraint, change, relaxed.workload.tokens / seconds / rate)


def _relaxed(spec: SearchSpec) -> Iterator[tuple[str, str, SearchSpec]]:
    cluster, workload = spec.cluster, spec.workload

    def links(near: bool) -> dict[str, Link]:
        return {
            tier: Link(link.latency_s, link.bytes_per_s * (2 if (tier in NEAR) == near else 1))
            for tier, link in cluster.links.items()
        }

    def measured(*prefixes: str, tiers: tuple[str, ...] = ()) -> Calibration:
        def eased(name: str, curve: Curve) -> Curve:
            parts = name.removeprefix(IDLE).split("/")
            if parts[0] not in prefixes or (tiers and parts[1] not in tiers):
                return curve
            return replace(curve, seconds=tuple(seconds / 2 for seconds in curve.seconds))

        curves = {name: eased(name, curve) for name, curve in cluster.calibration.curves.items()}
        return replace(cluster.calibration, curves=curves)

    collectives = ("p2p", "all_to_all", "all_reduce", "all_gather")
    far = tuple(tier for tier in TIERS if tier not in NEAR)
    device = cluster.accelerator
    eased = {
        "links between nodes": replace(cluster, links=links(False), calibration=measured(*collectives, tiers=far)),
        "links inside nodes": replace(cluster, links=links(True), calibration=measured(*collectives, tiers=NEAR)),
        "compute": replace(cluster, accelerator=device and _faster(device, compute=2), calibration=measured(*KERNELS)),
        "memory bandwidth": replace(
            cluster,
            accelerator=device and _faster(device, memory=2),
            calibration=measured("elementwise", "activation", "norm", "gate", "adamw"),
        ),
        "host": replace(cluster, accelerator=device and _faster(device, host=2), calibration=measured("host_op")),
    }
    for constraint, other in eased.items():
        yield constraint, "twice as fast", replace(spec, cluster=other)
    twice = replace(workload, global_batch=2 * workload.global_batch)
    yield "global batch", "twice as many sequences a step", replace(spec, workload=twice)


def _faster(device: Accelerator, *, compute: float = 1, memory: float = 1, host: float = 1) -> Accelerator:
    efficiency = device.efficiency
    return replace(
        device,
        peak_flops={dtype: rate * compute for dtype, rate in device.peak_flops.items()},
        memory_bytes_per_s=device.memory_bytes_per_s * memory,
        efficiency=replace(efficiency, launch_s=efficiency.launch_s / host, step_host_s=efficiency.step_host_s / host),
    )
