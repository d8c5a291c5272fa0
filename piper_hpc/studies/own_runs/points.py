"""The layouts of `make validate-testbed`: two models on eight ranks, every axis that trains, none used for fitting."""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.spec import Layout, ModelSpec, Routing, Workload
from piper_hpc.spec.routing_workloads import drawn_shares

RANKS = 8
EVEN, SKEWED = "W0", "W2"
"""Routing is given, so that the model is told exactly what was routed: what a router does is not what is tested."""

NARROW = ModelSpec(
    "narrow", layers=8, hidden=128, heads=4, kv_heads=2, head_dim=32, experts=16, top_k=2, expert_ffn=128, vocab=256
)
WIDE = ModelSpec(
    "wide", layers=4, hidden=256, heads=8, kv_heads=4, head_dim=32, experts=16, top_k=4, expert_ffn=256, vocab=256
)
BATCH, SEQUENCE = 32, 64


@dataclass(frozen=True)
class Point:
    """One training that is predicted and measured. routing: of piper_hpc.spec.routing_workloads."""

    model: ModelSpec
    layout: Layout
    routing: str = EVEN

    @property
    def name(self) -> str:
        """Unique among all points."""
        layout = self.layout
        parts = [self.model.name, f"pp{layout.pp}", f"ep{layout.ep}", f"dp{layout.dp}", f"mb{layout.micro_batch}"]
        parts += [layout.schedule] if layout.pp > 1 else []
        parts += [layout.all_to_all] if layout.ep > 1 else []
        parts += [f"zero{layout.zero}"] * bool(layout.zero)
        parts += [layout.recompute] * (layout.recompute != "none")
        parts += ["skewed"] * (self.routing == SKEWED)
        return " ".join(parts)

    @property
    def workload(self) -> Workload:
        """With the shares by expert that the routing draws."""
        if self.routing == EVEN:
            return Workload(BATCH, SEQUENCE)
        shares = drawn_shares(self.routing, self.model.experts, self.model.top_k, BATCH * SEQUENCE)
        return Workload(BATCH, SEQUENCE, routing=Routing(histogram=shares))


def _layouts(model: ModelSpec, *layouts: Layout, routing: str = EVEN) -> list[Point]:
    return [Point(model, layout, routing) for layout in layouts]


POINTS = (
    *_layouts(
        NARROW,
        Layout(dp=8, micro_batch=4),
        Layout(ep=8, micro_batch=4),
        Layout(pp=2, ep=4, micro_batch=2),
        Layout(pp=2, ep=4, micro_batch=2, all_to_all="halo_dedup"),
        Layout(pp=4, ep=2, micro_batch=2),
        Layout(pp=4, ep=2, micro_batch=4),
        Layout(pp=4, ep=2, micro_batch=2, schedule="zb_h1"),
        Layout(pp=4, ep=2, micro_batch=2, vpp=2, schedule="interleaved"),
        Layout(pp=4, ep=1, dp=2, micro_batch=2, schedule="gpipe", zero=1),
    ),
    *_layouts(NARROW, Layout(pp=2, ep=4, micro_batch=2), routing=SKEWED),
    *_layouts(
        WIDE,
        Layout(dp=8, micro_batch=4, zero=1),
        Layout(ep=8, micro_batch=4),
        Layout(pp=2, ep=4, micro_batch=2),
        Layout(pp=2, ep=4, micro_batch=2, all_to_all="halo"),
        Layout(pp=2, ep=2, dp=2, micro_batch=2, recompute="selective", zero=1),
        Layout(pp=2, ep=4, micro_batch=4, recompute="full"),
        Layout(pp=2, ep=2, dp=2, micro_batch=2, vpp=2, schedule="zbv"),
    ),
    *_layouts(
        WIDE, Layout(pp=2, ep=4, micro_batch=2), Layout(ep=8, micro_batch=4, all_to_all="halo_dedup"), routing=SKEWED
    ),
)


@dataclass(frozen=True)
class Asked:
    """Which points are measured, and how often each."""

    points: tuple[str, ...] = tuple(point.name for point in POINTS)
    repeats: int = 3

    @property
    def chosen(self) -> list[Point]:
        """The points, in the order of POINTS."""
        return [point for point in POINTS if point.name in self.points]
