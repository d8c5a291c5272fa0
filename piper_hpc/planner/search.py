"""A plan: the layouts that fit, the best of them predicted in full and ranked, and what limits the best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from piper_hpc.planner.axes import Axes
from piper_hpc.planner.eager import divisors
from piper_hpc.planner.engines import engine_of
from piper_hpc.planner.limits import limits
from piper_hpc.planner.question import EP_DOMAINS, RANK_BY, Question, Ranked
from piper_hpc.resource_model.prediction import describe
from piper_hpc.spec import ClusterSpec, ModelSpec, Prediction, Workload

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Plan:
    """Layouts ranked by prediction, best first, and what became of the others.

    Every combination of the axes is rejected (counted by the rule it breaks), fitting or pruned; see
    question.Found. pareto: the layouts of which none is both faster and smaller (nor on fewer ranks).
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
    candidates: list[Prediction]
    rejected: dict[str, int]
    pareto: list[Ranked] = field(default_factory=list)
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
) -> Plan:
    """Rank the layouts of `model` on `cluster` for `workload`, the best `candidates` of them in full.

    ranks: how many ranks a layout may use (default: all of the cluster, none fewer); rank_by: mfu, tokens_per_s or
    memory (the least peak, the most head-room first); ep_domain: none, switch or node, how far an expert group may
    reach (Eq 10); executor: piper, megatron or auto (see engine_of); axes: their values, by default those of
    conf/plan/default.yaml, for piper every divisor; all_to_all: of the layouts for piper, for megatron it is an axis.
    Nothing feasible is no error: there are no candidates then. Raises
    ValueError for an unknown option, and ResourceModelError for a cluster that nothing is known of.
    """
    started = time.perf_counter()
    for name, value, allowed in (("ep_domain", ep_domain, EP_DOMAINS), ("rank_by", rank_by, RANK_BY)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}, for example {name}={allowed[0]}")
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
    question = Question(
        model,
        cluster,
        workload,
        axes.of_model(model),
        counts,
        rank_by,
        ep_domain,
        max(candidates, engine.rescored),
        all_to_all,
    )
    found = engine.search(question)
    # The best inside Eq 10's domain is simulated too: what staying inside costs compares like with like.
    contenders = dict.fromkeys([*found.best, *([found.inside] if found.inside else [])])
    simulated = sorted((engine.simulated(question, one) for one in contenders), key=lambda one: one.key)
    best = [engine.predict(question, one.layout) for one in simulated[:candidates]]
    return Plan(
        model=describe(model, workload.sequence),
        cluster=cluster.name,
        executor=engine.name,
        workload=workload,
        rank_by=rank_by,
        searched=found.searched,
        fitting=found.fitting,
        pruned=found.pruned,
        feasible=found.feasible,
        seconds=time.perf_counter() - started,
        memory_bytes=cluster.memory_bytes,
        candidates=best,
        rejected=dict(sorted(found.rejected.items())),
        pareto=found.front,
        limits=limits(engine, question, found, simulated, best[0]) if best else None,
    )
