"""A plan: the layouts that fit, the best of them predicted in full and ranked, and what limits the best."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from piper_hpc.planner.axes import Axes
from piper_hpc.planner.eager import divisors
from piper_hpc.planner.engines import engine_of
from piper_hpc.planner.limits import limits
from piper_hpc.planner.search_spec import EP_DOMAINS, NO_FIT, RANK_BY, RankedLayout, SearchSpec
from piper_hpc.resource_model.prediction import model_summary
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Prediction, Workload

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """Layouts ranked by prediction, best first, and what became of the others.

    Every combination of the axes is rejected (counted by the rule it breaks), fitting or pruned; see
    search_spec.SearchResult. pareto: the layouts of which none is both faster and smaller (nor on fewer ranks).
    shapes: the best of each (pp, ep, tp, cp) among the layouts that were simulated, best first.
    memory_headroom: the share of memory_bytes, a rank's memory, that every layout leaves free.
    """

    model: dict[str, Any]
    cluster: str
    executor: str
    workload: Workload
    rank_by: str
    searched: int
    fitting: int
    pruned: int
    feasible: int
    seconds: float
    memory_bytes: int
    memory_headroom: float
    candidates: list[Prediction]
    shapes: list[Prediction]
    rejected: dict[str, int]
    pareto: list[RankedLayout] = field(default_factory=list)
    limits: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "cluster": self.cluster,
            "executor": self.executor,
            "global_batch": self.workload.global_batch,
            "sequence": self.workload.sequence,
            "recipe": self.workload.recipe.name,
            "rank_by": self.rank_by,
            "searched": self.searched,
            "pruned": self.pruned,
            "feasible": self.feasible,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "memory_headroom": self.memory_headroom,
            "candidates": [candidate.document() for candidate in self.candidates],
            "rejected": self.rejected,
            "pareto": [
                {
                    "layout": asdict(one.layout),
                    "ranks": one.layout.ranks,
                    "step_time_s": one.step_time_s,
                    "peak_bytes": int(one.peak_bytes),
                }
                for one in self.pareto
            ],
            "limits": self.limits,
        }


def plan(
    model: ModelSpec,
    cluster: ClusterSpec,
    workload: Workload,
    *,
    ranks: Sequence[int] | None = None,
    rank_by: str = "mfu",
    ep_domain: str = "none",
    candidates: int = 20,
    executor: str = "auto",
    axes: Axes | None = None,
    all_to_all: str = "flat",
    memory_headroom: float = 0.0,
) -> Plan:
    """Rank the layouts of `model` on `cluster` for `workload`, the best `candidates` of them in full.

    ranks: how many ranks a layout may use (default: all of the cluster, none fewer); rank_by: mfu, tokens_per_s or
    memory (the least peak, the most head-room first); ep_domain: none, switch or node, how far an expert group may
    reach (Eq 10); executor: piper, megatron or auto (see engine_of); axes: their values, by default those of
    conf/plan/default.yaml, for piper every divisor; all_to_all: of the layouts for piper, for megatron it is an axis;
    memory_headroom: share of a rank's memory that Eq 11 keeps free, 0 to below 1 (conf/plan/default.yaml has its
    sources). Nothing feasible is no error: there are no candidates then. Raises
    ValueError for an unknown option, and ResourceModelError for a cluster that nothing is known of.
    """
    started = time.perf_counter()
    for name, value, allowed in (("ep_domain", ep_domain, EP_DOMAINS), ("rank_by", rank_by, RANK_BY)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}, for example {name}={allowed[0]}")
    if not 0 <= memory_headroom < 1:
        raise ValueError(f"memory_headroom={memory_headroom}: must lie in [0, 1), for example memory_headroom=0.08")
    counts = tuple(sorted(set(ranks or [cluster.ranks])))
    for count in counts:
        if not 0 < count <= cluster.ranks:
            raise ValueError(f"ranks={count}: cluster '{cluster.name}' has {cluster.ranks}; use ranks={cluster.ranks}")
    every = Axes.shipped()
    engine = engine_of(executor, cluster, axes or every)
    if axes is None:
        axes = every
        if engine.name == "piper":
            of_ranks = tuple(sorted({divisor for count in counts for divisor in divisors(count)}))
            axes = replace(axes, pp=of_ranks, ep=of_ranks, micro_batch=tuple(divisors(workload.global_batch)))
    spec = SearchSpec(
        model,
        replace(cluster, memory_bytes=int((1 - memory_headroom) * cluster.memory_bytes)),
        workload,
        axes.of_model(model),
        counts,
        rank_by,
        ep_domain,
        max(candidates, engine.rescore_count),
        all_to_all,
    )
    result = engine.search(spec)
    # The best inside Eq 10's domain is simulated too: what staying inside costs compares like with like.
    contenders = dict.fromkeys([*result.best, *([result.in_domain] if result.in_domain else [])])
    rescored = sorted((engine.rescored(spec, one) for one in contenders), key=lambda one: one.key)
    best = [engine.predict(spec, one.layout) for one in rescored[:candidates]]
    known = {one.layout: one for one in best}
    shapes = [known.get(layout) or engine.predict(spec, layout) for layout in _shapes(rescored)[:candidates]]
    return Plan(
        model=model_summary(model, workload.sequence),
        cluster=cluster.name,
        executor=engine.name,
        workload=workload,
        rank_by=rank_by,
        searched=result.searched,
        fitting=result.fitting,
        pruned=result.pruned,
        feasible=result.feasible,
        seconds=time.perf_counter() - started,
        memory_bytes=cluster.memory_bytes,
        memory_headroom=memory_headroom,
        candidates=best,
        shapes=shapes,
        rejected=_reasons(result.rejected, memory_headroom),
        pareto=result.front,
        limits=limits(engine, spec, result, rescored, best[0], cluster.memory_bytes) if best else None,
    )


def _shapes(ranked: Sequence[RankedLayout]) -> list[Layout]:
    """The first layout of each (pp, ep, tp, cp), in order; the others are the same degrees with other details."""
    first: dict[tuple[int, ...], Layout] = {}
    for one in ranked:
        layout = one.layout
        first.setdefault((layout.pp, layout.ep, layout.tp, layout.cp), layout)
    return list(first.values())


def _reasons(rejected: Mapping[str, int], memory_headroom: float) -> dict[str, int]:
    """Counts by reason, sorted; Eq 11's says what was kept free."""
    kept = f"{NO_FIT}, less a head-room of {100 * memory_headroom:g} %" if memory_headroom else NO_FIT
    return {kept if reason == NO_FIT else reason: count for reason, count in sorted(rejected.items())}
