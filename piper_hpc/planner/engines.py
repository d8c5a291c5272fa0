"""The two executors that plans are made for, behind one interface."""

from __future__ import annotations

from dataclasses import replace

from piper_hpc.planner import analytical
from piper_hpc.planner import eager as measured
from piper_hpc.planner.axes import Axes
from piper_hpc.planner.search_spec import Engine, RankedLayout, SearchResult, SearchSpec
from piper_hpc.resource_model import analytical as analytical_model
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.predict import predict
from piper_hpc.resource_model.topology import axis_groups, topology_of
from piper_hpc.spec import EXECUTIONS, TIERS, ClusterSpec, Layout, Prediction

EXECUTORS = ("piper", "megatron")


class Piper:
    """This project's eager executor: every prediction is on the schedule's timeline already."""

    name = "piper"
    rescore_count = 0

    def search(self, spec: SearchSpec) -> SearchResult:
        """See measured.search."""
        return measured.search(spec)

    def predict(self, spec: SearchSpec, layout: Layout) -> Prediction:
        """See resource_model.predict."""
        return predict(spec.model, spec.cluster, layout, spec.workload)

    def step_time_s(self, spec: SearchSpec, layout: Layout) -> float:
        """Seconds of the step, as `search` ranks by."""
        return self.predict(spec, layout).step_time_s

    def expert_tier(self, spec: SearchSpec, layout: Layout) -> int:
        """Of all stages' expert groups."""
        return measured.widest_tier(layout, spec.cluster)

    def rescored(self, spec: SearchSpec, candidate: RankedLayout) -> RankedLayout:
        """The same: it was simulated."""
        return candidate


class Megatron:
    """Fused kernels and every axis: closed forms for all, the schedule's simulation for the best."""

    name = "megatron"
    rescore_count = 100
    execution = EXECUTIONS["megatron"]

    def search(self, spec: SearchSpec) -> SearchResult:
        """See analytical.search."""
        return analytical.search(spec, self.execution)

    def predict(self, spec: SearchSpec, layout: Layout) -> Prediction:
        """See resource_model.predict."""
        return predict(spec.model, spec.cluster, layout, spec.workload, self.execution)

    def step_time_s(self, spec: SearchSpec, layout: Layout) -> float:
        """Seconds of the step in closed form, as `search` ranks by."""
        return float(self._step(spec, layout).step_time_s)

    def expert_tier(self, spec: SearchSpec, layout: Layout) -> int:
        """Of the all-to-all group."""
        group = axis_groups(layout, topology_of(spec.cluster)).experts
        return next(tier for tier in range(len(TIERS)) if group.within(tier) >= group.size)

    def rescored(self, spec: SearchSpec, candidate: RankedLayout) -> RankedLayout:
        """With the bubble and the waits of the timeline; as it is where that has too many actions to be played."""
        step = self._step(spec, candidate.layout)
        timeline = analytical_model.simulate(step, candidate.layout, self.execution)
        if timeline is None or candidate.layout.pp == 1:
            return candidate
        rest = sum(float(seconds) for name, seconds in step.terms.items() if name not in ("bubble_s", "p2p_s"))
        seconds = rest + timeline.step_s - max(timeline.busy_s)
        score = float(spec.score(candidate.layout.ranks, seconds, candidate.peak_bytes))
        return replace(candidate, score=score, step_time_s=seconds)

    def _step(self, spec: SearchSpec, layout: Layout) -> analytical_model.Step:
        return analytical_model.stepper(spec.model, spec.cluster, layout, spec.workload, self.execution).evaluate()


def engine_of(executor: str, cluster: ClusterSpec, axes: Axes) -> Engine:
    """The engine by name; `auto`: by what the axes ask for.

    The analytical engine has every axis: it is taken where a layout is asked for that this project's executor cannot
    train, on a device that a data sheet describes. Else the eager one, where curves were measured or the device is not
    known. Raises ValueError for another name, ResourceModelError where a device's efficiency is needed and not known.
    """
    if executor == "auto":
        sheet = cluster.accelerator is not None and cluster.accelerator.published
        wide = not axes.trains or not cluster.calibration.measured
        executor = "megatron" if sheet and wide else "piper"
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r}: must be auto or one of {', '.join(EXECUTORS)}, for example auto")
    if executor == "megatron" and cluster.accelerator is None:
        raise ResourceModelError(
            f"executor=megatron: of cluster '{cluster.name}' no accelerator is known whose kernels have a price; "
            "use executor=piper, or cluster=dgx_h100"
        )
    return Piper() if executor == "piper" else Megatron()
