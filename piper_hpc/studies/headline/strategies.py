"""The strategies that are compared, and the model that all of them train: each is a search of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from piper_hpc.planner.axes import Axes
from piper_hpc.planner.eager import divisors
from piper_hpc.planner.search import plan
from piper_hpc.spec import AUTO, ClusterSpec, ModelSpec, Prediction, Routing, Workload
from piper_hpc.testbed.options import Options

MACHINE = Options(period_us=5_000)
"""The testbed's four nodes of two ranks in two racks. A rank that waits saves quota until its period ends, which no
device does: half the usual period, the shortest that the kernel takes, saves half as much."""
SITE, NAMED = "frontier", "xmoe_medium"
"""Whose ratio of communication to compute the links keep."""
MODEL = ModelSpec(
    "headline", layers=4, hidden=128, heads=4, kv_heads=4, head_dim=32, experts=32, top_k=4, expert_ffn=256, vocab=256
)
WORKLOAD = Workload(global_batch=64, sequence=64, routing=Routing("forced"))
MEMORY_BYTES = 72 * 2**20
"""Of a rank, for every strategy. At the paper's scale a machine holds every expert once, and no rank a whole layer;
here memory would hold more, so that it is a rule: pp * ep = ranks, of fewer layers than ranks; all must exchange."""


@dataclass(frozen=True)
class Strategy:
    """What a search may choose from. axes: values of those that it narrows; all_to_all: as in SearchSpec; migrates:
    whether experts move."""

    key: str
    name: str
    stands_for: str
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    all_to_all: str = "flat"
    migrates: bool = False

    def settings(self, cluster: ClusterSpec, count: int) -> list[Prediction]:
        """The best of the strategy by the resource model, best first, that differ in more than recomputation, ZeRO and
        the split of layers."""
        sizes = tuple(divisors(WORKLOAD.global_batch))
        axes = replace(Axes.shipped(), pp=DEGREES, ep=DEGREES, micro_batch=sizes)
        axes = replace(axes, **self.axes)
        found: list[Prediction] = []
        for pp in axes.pp:
            ep = MACHINE.ranks // pp
            if ep in axes.ep:
                found += plan(
                    *(MODEL, replace(cluster, memory_bytes=MEMORY_BYTES), WORKLOAD),
                    executor="piper",
                    axes=replace(axes, pp=(pp,), ep=(ep,)),
                    all_to_all=self.all_to_all,
                    candidates=SHADES * count,
                ).candidates
        best: dict[tuple[int | str, ...], Prediction] = {}
        for prediction in sorted(found, key=lambda one: one.step_time_s):
            layout = prediction.layout
            best.setdefault((layout.pp, layout.vpp, layout.micro_batch, layout.schedule), prediction)
        return list(best.values())[:count]


SHADES = 24
"""Of one setting, in a plan, at most: six recomputations, two ZeRO stages, two splits."""
DEGREES = tuple(divisors(MACHINE.ranks))
OVER_ALL = {"pp": (1,), "vpp": (1,), "ep": (MACHINE.ranks,), "schedule": ("1f1b",)}
FLAT, PADDED, XMOE, PAPER, OURS = "a", "a_padded", "b", "c", "d"
STRATEGIES = {
    strategy.key: strategy
    for strategy in (
        Strategy(FLAT, "EP over all ranks, flat", "expert-data parallelism without padding", OVER_ALL),
        Strategy(
            PADDED, "EP over all ranks, padded", "DeepSpeed-MoE and Tutel where no token is dropped", OVER_ALL,
            all_to_all="flat_padded",
        ),
        Strategy(
            XMOE, "EP over all ranks, deduplicated by node, ZeRO 1",
            "X-MoE (arXiv 2508.13337); halo_dedup stands in for its pilot tokens and replication inside nodes",
            OVER_ALL | {"zero": (1,)}, all_to_all="halo_dedup",
        ),
        Strategy(
            PAPER, "PP x EP inside nodes, 1F1B", "Piper's plan (arXiv 2605.05049)",
            {"vpp": (1,), "ep": (MACHINE.ranks_per_node,), "schedule": ("1f1b",), "zero": (0,)},
        ),
        Strategy(OURS, "the planner's choice", "this project with all it has", all_to_all=AUTO, migrates=True),
    )
}  # fmt: skip
