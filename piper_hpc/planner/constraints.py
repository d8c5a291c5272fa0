"""What a layout must satisfy: Eq 7-11 of arXiv 2605.05049 and the rules of batch and pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from piper_hpc.resource_model.groups import TIERS, layout_groups
from piper_hpc.resource_model.memory import peak_bytes
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Tier, Workload

EP_DOMAINS = {"none": Tier.SYSTEM.value, "switch": Tier.RACK.value, "node": Tier.NODE.value}
"""Eq 10 as an option: the widest link that an expert group may cross (a rack is what one leaf switch joins)."""


def paper_expert_domain(gpus_per_node: int, nodes_per_switch: int) -> int:
    """Eq 10: the largest EP that stays behind one switch, g N_h."""
    return gpus_per_node * nodes_per_switch


def divisors(number: int) -> list[int]:
    """All divisors in ascending order."""
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def degrees(ranks: int) -> Iterator[Layout]:
    """Every (pp, ep, dp) with pp * ep * dp = ranks (Eq 7, with expert replicas as the third axis)."""
    for pp in divisors(ranks):
        for ep in divisors(ranks // pp):
            yield Layout(pp=pp, ep=ep, dp=ranks // (pp * ep))


def broken_by_degrees(
    layout: Layout, model: ModelSpec, cluster: ClusterSpec, workload: Workload, ep_domain: str
) -> str | None:
    """The first rule that no micro-batch size can mend, or None."""
    rules: dict[str, Callable[[], bool]] = {
        "Eq 8: ep must divide the experts": lambda: model.experts % layout.ep == 0,
        "Eq 9: pp must not exceed the layers": lambda: layout.pp <= model.layers,
        "batch: ranks / pp must divide the global batch": lambda: workload.global_batch % layout.dense_dp == 0,
        f"Eq 10: expert groups must stay within ep_domain={ep_domain}": lambda: _within(layout, cluster, ep_domain),
    }
    return next((rule for rule, holds in rules.items() if not holds()), None)


def broken_by_micro_batch(layout: Layout, model: ModelSpec, cluster: ClusterSpec, workload: Workload) -> str | None:
    """The first rule that this micro-batch size breaks, or None."""
    if layout.micro_batches(workload.global_batch) < layout.pp:
        return "schedule 1f1b: at least pp micro-batches a step"
    if max(peak_bytes(model, layout, workload)) > cluster.memory_bytes:
        return "Eq 11: peak memory must fit the rank's memory"
    return None


def _within(layout: Layout, cluster: ClusterSpec, ep_domain: str) -> bool:
    if ep_domain == "none":
        return True
    widest = max(TIERS.index(stage.experts.tier) for stage in layout_groups(layout, cluster).stages)
    return widest <= TIERS.index(EP_DOMAINS[ep_domain])
