"""Simulated all-to-all on Frontier: resource_model.all_to_all on the links of conf/cluster/frontier.yaml. Pure.

Nothing here was measured on Frontier. Every constant is named with its source; the one that decides, the latency of a
message between nodes (a_i), is varied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

import numpy as np

from piper_hpc.cluster import accelerator, data_sheet, preset
from piper_hpc.resource_model.all_to_all import AllToAllRouting, Phases, all_to_all
from piper_hpc.resource_model.topology import Links, group, tier_links
from piper_hpc.spec import TIERS, Link, Topology, get_algorithm

SITE = "frontier"
BEYOND = tuple(f"latency_s of link {tier}" for tier in TIERS[TIERS.index("node") + 1 :])
LATENCIES_S = (1e-6, 2e-6, 5e-6, 1e-5, 2e-5, 5e-5)
POINTS = 5
"""Sizes a panel, in equal steps of the logarithm, ends included."""
EXPERTS, TOP_K, HIDDEN, BYTES_PER_VALUE = 256, 8, 7168, 2


@dataclass(frozen=True)
class Panel:
    """One panel of Fig 8 of arXiv 2605.05049: HALO over RCCL. Sizes are the send buffer of one rank, in MB of 1e6.

    annotated: the three speed-ups printed in it; which variant and which size they belong to is not recoverable.
    """

    nodes: int
    least_mb: float
    most_mb: float
    annotated: tuple[float, float, float]


FIG_8 = (
    Panel(16, 2.1, 4295, (1.80, 1.75, 1.78)),
    Panel(32, 4.2, 4295, (8.03, 7.92, 8.06)),
    Panel(64, 8.4, 2147.5, (4.44, 4.94, 4.67)),
    Panel(128, 16.8, 4295, (1.81, 3.54, 4.40)),
    Panel(256, 33.6, 4295, (4.36, 3.44, 5.56)),
    Panel(512, 67.1, 4295, (3.50, 3.54, 3.03)),
)


@dataclass(frozen=True)
class Constant:
    """One assumption: what it is, its value and unit, and where it is from."""

    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Variant:
    """One algorithm of the study: a name for people, and what the model is asked for."""

    name: str
    algorithm: str
    phases: Phases = "overlapped"

    @property
    def dedup(self) -> bool:
        """Whether it sends a token once where several of its experts are."""
        return get_algorithm(self.algorithm).dedup


VARIANTS = (
    Variant("flat", "flat"),
    Variant("HALO V0", "halo", "sequential"),
    Variant("HALO V1, V2", "halo"),
    Variant("3 levels V0", "halo3", "sequential"),
    Variant("3 levels", "halo3"),
    Variant("flat dedup", "flat_dedup"),
    Variant("HALO dedup", "halo_dedup"),
    Variant("3 levels dedup", "halo3_dedup"),
)
"""V1 and V2 differ in which phase is issued first, which a sum of latencies and bytes cannot tell apart."""


@dataclass(frozen=True)
class Machine:
    """The simulated machine: domains in ranks, a link a tier, and what a copied byte costs."""

    topology: Topology
    links: Links
    copy_s_per_byte: float
    constants: tuple[Constant, ...]

    def with_latency(self, between_nodes_s: float) -> Machine:
        """The same with another latency of every tier beyond the node; its constants say so."""
        inside = TIERS.index("node")
        changed = [
            link if tier <= inside else Link(between_nodes_s, link.bytes_per_s)
            for tier, link in enumerate(self.links.links)
        ]
        constants = [
            replace(each, value=between_nodes_s, source="chosen here") if each.name in BEYOND else each
            for each in self.constants
        ]
        return replace(self, links=Links(tuple(changed), self.links.notes), constants=tuple(constants))


def machine() -> Machine:
    """Frontier as its file describes it."""
    config = preset.config(SITE)
    assert config.accelerator is not None
    device = accelerator.facts(config.accelerator)
    topology = data_sheet.topology_of(config)
    assert topology is not None and device.memory_bytes_per_s is not None
    links = tier_links(data_sheet.links_of(config), name=SITE, tiers=topology.tiers)
    constants = [
        Constant(f"{fact} of link {tier}", getattr(link, fact), unit, config.sources[f"links.{tier}.{fact}"])
        for tier, link in data_sheet.links_of(config).items()
        for fact, unit in (("latency_s", "s"), ("bytes_per_s", "bytes/s of one GCD, one way"))
    ]
    copy_s_per_byte = 2 / device.memory_bytes_per_s
    pair, node, switch, _ = topology.sizes
    constants += [
        Constant("ranks of a module", pair, "GCD", config.sources["topology.ranks_per_pair"]),
        Constant("ranks of a node", node, "GCD", "OLCF Frontier guide (2026-07-22)"),
        Constant("ranks below one switch", switch, "GCD", config.sources["topology.nodes_per_switch"]),
        Constant(
            "copy of a byte in device memory", copy_s_per_byte, "s/byte",
            f"read and write at the data sheet's rate ({device.sources['memory_bytes_per_s']}): no copy reaches it",
        ),
        Constant("experts", EXPERTS, "", "DeepSeek-V3; one a rank where ranks are more: no such model was published"),
        Constant("experts a token", TOP_K, "", "DeepSeek-V3; uniform routing"),
        Constant("row", HIDDEN * BYTES_PER_VALUE, "bytes", "DeepSeek-V3: hidden 7168 in bfloat16"),
    ]  # fmt: skip
    return Machine(topology, links, copy_s_per_byte, tuple(constants))


def seconds(variant: Variant, on: Machine, ranks: int, buffer_bytes: float) -> float:
    """Seconds of one all-to-all in which every rank sends `buffer_bytes`, equally to all.

    Deduplicated variants carry the routed rows of as many bytes: what a dispatch of that size would take.
    """
    row_bytes = HIDDEN * BYTES_PER_VALUE
    answer = all_to_all(
        variant.algorithm,
        group(on.topology, ranks),
        on.links,
        buffer_bytes / row_bytes,
        row_bytes,
        AllToAllRouting(max(EXPERTS, ranks), TOP_K),
        copy_s_per_byte=on.copy_s_per_byte,
        phases=variant.phases,
    )
    return float(answer.seconds)


@dataclass(frozen=True)
class Point:
    """One size of a panel: seconds of every variant."""

    nodes: int
    buffer_bytes: float
    pair_bytes: float
    seconds: dict[str, float]

    def best(self, dedup: bool) -> str:
        """The fastest variant, with or without the deduplicated ones."""
        names = [variant.name for variant in VARIANTS if dedup or not variant.dedup]
        return min(names, key=lambda name: self.seconds[name])

    def speedup(self, name: str) -> float:
        """Over flat."""
        return self.seconds["flat"] / self.seconds[name]


def ranks_of(on: Machine, nodes: int) -> int:
    """Ranks (GCDs) on so many nodes."""
    return nodes * on.topology.node


def point(on: Machine, nodes: int, buffer_bytes: float) -> Point:
    """Every variant at one size."""
    ranks = ranks_of(on, nodes)
    taken = {variant.name: seconds(variant, on, ranks, buffer_bytes) for variant in VARIANTS}
    return Point(nodes, buffer_bytes, buffer_bytes / ranks, taken)


def sizes(panel: Panel) -> list[float]:
    """Bytes a rank, over the panel's axis."""
    return [float(size) for size in np.geomspace(panel.least_mb * 1e6, panel.most_mb * 1e6, POINTS)]


def points(on: Machine) -> list[Point]:
    """Every panel's sizes."""
    return [point(on, panel.nodes, size) for panel in FIG_8 for size in sizes(panel)]


def crossover_bytes(on: Machine, nodes: int, name: str, low: float = 1e3, high: float = 1e13) -> float | None:
    """The send buffer of one rank below which `name` beats flat; None where it never does, infinity where always."""
    (variant,) = (variant for variant in VARIANTS if variant.name == name)
    ranks = ranks_of(on, nodes)

    def gain(size: float) -> float:
        return seconds(VARIANTS[0], on, ranks, size) - seconds(variant, on, ranks, size)

    if gain(low) <= 0:
        return None
    if gain(high) > 0:
        return float("inf")
    for _ in range(40):
        middle = 2 ** ((log2(low) + log2(high)) / 2)
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return low


def latency_for(on: Machine, nodes: int, buffer_bytes: float, wanted: float, name: str = "HALO V1, V2") -> float | None:
    """The latency between nodes at which `name` is `wanted` times as fast as flat; None where no latency makes it so.

    The ratio grows with the latency towards its bound, ranks a node and less.
    """
    low, high = 1e-9, 1.0
    if point(on.with_latency(high), nodes, buffer_bytes).speedup(name) < wanted:
        return None
    for _ in range(40):
        middle = 2 ** ((log2(low) + log2(high)) / 2)
        reached = point(on.with_latency(middle), nodes, buffer_bytes).speedup(name) >= wanted
        low, high = (low, middle) if reached else (middle, high)
    return high


@dataclass(frozen=True)
class Sensitivity:
    """One latency and one panel: HALO's best and worst ratio over its sizes, and below which size variants win."""

    latency_s: float
    nodes: int
    most: float
    least: float
    crossover_bytes: dict[str, float | None]


CROSSING = ("HALO V1, V2", "3 levels", "HALO dedup")


def sensitivity(on: Machine, latencies: Sequence[float] = LATENCIES_S) -> list[Sensitivity]:
    """How much of the answer hangs on the latency between nodes."""
    found = []
    for latency_s in latencies:
        varied = on.with_latency(latency_s)
        for panel in FIG_8:
            ratios = [point(varied, panel.nodes, size).speedup("HALO V1, V2") for size in sizes(panel)]
            crossings = {name: crossover_bytes(varied, panel.nodes, name) for name in CROSSING}
            found.append(Sensitivity(latency_s, panel.nodes, max(ratios), min(ratios), crossings))
    return found


@dataclass(frozen=True)
class PaperComparison:
    """Speed-ups over flat of one panel of the paper, and the model's, and what would make the model give them.

    needed_s: latency between nodes at the least, middle and most size, for the smallest of the annotated ratios; None:
    none is enough. flat_share: the share of the link's rate that flat would reach at the most size, were that ratio
    the paper's there, and HALO as the model has it.
    """

    nodes: int
    annotated: tuple[float, float, float]
    most: float
    least: float
    needed_s: tuple[float | None, float | None, float | None]
    flat_share: float


def compare_with_paper(on: Machine) -> list[PaperComparison]:
    """Every panel."""
    found = []
    for panel in FIG_8:
        axis = sizes(panel)
        ratios = [point(on, panel.nodes, size).speedup("HALO V1, V2") for size in axis]
        wanted = min(panel.annotated)
        low, middle, high = (latency_for(on, panel.nodes, axis[at], wanted) for at in (0, len(axis) // 2, -1))
        share = ratios[-1] / wanted
        found.append(
            PaperComparison(panel.nodes, panel.annotated, max(ratios), min(ratios), (low, middle, high), share)
        )
    return found
