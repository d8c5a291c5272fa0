"""The two executors that plans are made for, behind one interface."""

from __future__ import annotations

from dataclasses import replace

from piper_hpc.planner import analytical
from piper_hpc.planner import eager as measured
from piper_hpc.planner.axes import Axes
from piper_hpc.planner.question import Engine, Found, Question, Ranked
from piper_hpc.resource_model import analytical as analytical_model
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.predict import predict
from piper_hpc.resource_model.topology import axis_groups, topology_of
from piper_hpc.spec import EXECUTIONS, TIERS, ClusterSpec, Layout, Prediction

EXECUTORS = ("piper", "megatron")


class Piper:
    """This project's eager executor: every prediction is on the schedule's timeline already."""

    name = "piper"
    rescored = 0

    def search(self, question: Question) -> Found:
        """See measured.search."""
        return measured.search(question)

    def predict(self, question: Question, layout: Layout) -> Prediction:
        """See resource_model.predict."""
        return predict(question.model, question.cluster, layout, question.workload)

    def step_time_s(self, question: Question, layout: Layout) -> float:
        """Seconds of the step, as `search` ranks by."""
        return self.predict(question, layout).step_time_s

    def expert_tier(self, question: Question, layout: Layout) -> int:
        """Of all stages' expert groups."""
        return measured.widest_tier(layout, question.cluster)

    def simulated(self, question: Question, one: Ranked) -> Ranked:
        """The same: it was simulated."""
        return one


class Megatron:
    """Fused kernels and every axis: closed forms for all, the schedule's simulation for the best."""

    name = "megatron"
    rescored = 100
    execution = EXECUTIONS["megatron"]

    def search(self, question: Question) -> Found:
        """See analytical.search."""
        return analytical.search(question, self.execution)

    def predict(self, question: Question, layout: Layout) -> Prediction:
        """See resource_model.predict."""
        return predict(question.model, question.cluster, layout, question.workload, self.execution)

    def step_time_s(self, question: Question, layout: Layout) -> float:
        """Seconds of the step in closed form, as `search` ranks by."""
        return float(self._step(question, layout).step_time_s)

    def expert_tier(self, question: Question, layout: Layout) -> int:
        """Of the all-to-all group."""
        group = axis_groups(layout, topology_of(question.cluster)).experts
        return next(tier for tier in range(len(TIERS)) if group.within(tier) >= group.size)

    def simulated(self, question: Question, one: Ranked) -> Ranked:
        """With the bubble and the waits of the timeline; as it is where that has too many actions to be played."""
        step = self._step(question, one.layout)
        timeline = analytical_model.simulate(step, one.layout, self.execution)
        if timeline is None or one.layout.pp == 1:
            return one
        rest = sum(float(seconds) for name, seconds in step.terms.items() if name not in ("bubble_s", "p2p_s"))
        seconds = rest + timeline.step_s - max(timeline.busy_s)
        score = float(question.score(one.layout.ranks, seconds, one.peak_bytes))
        return replace(one, score=score, step_time_s=seconds)

    def _step(self, question: Question, layout: Layout) -> analytical_model.Step:
        return analytical_model.stepper(
            question.model, question.cluster, layout, question.workload, self.execution
        ).evaluate()


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
