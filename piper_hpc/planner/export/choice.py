"""What is exported: the best layout of a plan with all that it was planned for; and what a file says of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from textwrap import wrap

from piper_hpc.planner.export.vocabulary import Vocabulary
from piper_hpc.planner.search import Plan
from piper_hpc.spec import (
    EXECUTIONS,
    Execution,
    Layout,
    ModelSpec,
    Prediction,
    Problem,
    Recompute,
    Routing,
    SpecError,
    Workload,
)

KEY = "plan.export"
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A plan's best layout. memory_bytes: of one rank; cluster: its name; execution: what it was predicted with."""

    model: ModelSpec
    workload: Workload
    best: Prediction
    execution: Execution
    cluster: str
    memory_bytes: int

    @staticmethod
    def of(plan: Plan, model: ModelSpec, target: str) -> Choice:
        """SpecError where no layout fits, with the reasons."""
        if not plan.candidates:
            reasons = "; ".join(f"{reason}: {count}" for reason, count in plan.rejected.items())
            rule = f"no layout fits, so there is nothing to export ({reasons})"
            raise SpecError(Problem(KEY, target, rule, "more cluster.nodes, or a smaller model"))
        execution = EXECUTIONS[plan.executor]
        return Choice(model, plan.workload, plan.candidates[0], execution, plan.cluster, plan.memory_bytes)

    @property
    def layout(self) -> Layout:
        """The layout that was chosen."""
        return self.best.layout

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step."""
        return self.layout.micro_batches(self.workload.global_batch)

    def head(self, vocabulary: Vocabulary, usage: Iterable[str], notes: Iterable[str]) -> str:
        """Comment lines: where a file is from, what was predicted, how to use it, and what it does not say."""
        layout, workload = self.layout, self.workload
        peak = max(self.best.peak_memory_bytes) / GIB
        lines = [
            f"{vocabulary.project} {vocabulary.version}: the best plan of {self.model.name} on {layout.ranks} ranks of "
            f"{self.cluster}, by piper_hpc.",
            f"Names as documented on {vocabulary.date} in",
            vocabulary.url,
            f"World size {layout.ranks}: pp {layout.pp} x dp {layout.dense_dp} x cp {layout.cp} x tp {layout.tp}; "
            f"of experts pp {layout.pp} x dp {layout.dp} x ep {layout.ep} x etp {layout.etp}.",
            f"Predicted for task.executor={self.execution.name}: {self.best.step_time_s:.4g} s a step of "
            f"{workload.global_batch} sequences of {workload.sequence} tokens,",
            f"{self.best.tokens_per_s:,.0f} tokens/s, {peak:.3g} of {self.memory_bytes / GIB:.3g} GiB on the fullest "
            "rank.",
            *usage,
        ]
        if unsaid := [line for note in notes for line in wrap(note, 110, initial_indent="- ", subsequent_indent="  ")]:
            lines += ["", "What is not as in the plan:", *unsaid]
        return "".join(f"# {line}".rstrip() + "\n" for line in lines)


@dataclass(frozen=True)
class Reading:
    """What a file says: degrees and the choices that go with them, and the workload.

    What it cannot say has its default: all-to-all and order of ranks in the layout, skew in the workload's routing.
    """

    layout: Layout
    workload: Workload


@dataclass(frozen=True)
class Written:
    """A file's text, and what it says."""

    text: str
    says: Reading


def plain(layout: Layout, model: ModelSpec) -> Layout:
    """The layout without what no file says, and with one name for what has several.

    all_to_all and placement as they are by default; `selective` is `attention`; `full` takes in every other part, `moe`
    the activation where all layers have experts; an even split is no split; a dense model has no expert ranks.
    """
    if not model.experts:
        layout = replace(layout, ep=1, etp=1, dp=layout.ranks // layout.pp)
    parts = layout.recomputed
    if parts.full:
        parts = Recompute(full=1)
    elif parts.moe and not model.dense_layers:
        parts = replace(parts, activation=0)
    split = tuple(len(layers) for layers in replace(layout, stage_layers=()).layers_by_stage(model.layers))
    stage_layers = () if layout.stage_layers == split else layout.stage_layers
    default = Layout()
    return replace(
        layout,
        recompute=recompute_text(parts),
        stage_layers=stage_layers,
        all_to_all=default.all_to_all,
        placement=default.placement,
    )


def shards(layout: Layout) -> bool:
    """Whether any rank shares parameters with another, so that ZeRO has something to shard."""
    return layout.dense_dp * layout.cp > 1 or layout.dp > 1


def recompute_text(parts: Recompute) -> str:
    """What `Recompute.parse` reads as these parts."""
    return "+".join(field.name for field in fields(Recompute) if getattr(parts, field.name)) or "none"


def said_workload(choice: Choice) -> Workload:
    """The workload with the routing that a file can state: its mode, and the capacity where rows are dropped."""
    routing = choice.workload.routing
    mode = routing.mode if choice.model.experts else "dropless"
    stated = Routing("drop", routing.capacity_factor) if mode == "drop" else Routing(mode)
    return replace(choice.workload, routing=stated)


def speed_notes(choice: Choice, project: str) -> list[str]:
    """What changes only how fast a step is: the algorithm of the all-to-all, and the order of ranks."""
    layout, notes = choice.layout, []
    if layout.ep > 1 and layout.all_to_all != "flat":
        notes.append(
            f"parallelism.all_to_all={layout.all_to_all}: {project}'s own all-to-all sends every row to its own rank; "
            "dispatch and combine may take longer."
        )
    if layout.ep > 1 and layout.placement != "linear":
        notes.append(
            f"parallelism.placement={layout.placement}: {project} numbers the ranks of an expert group one after the "
            "other (linear); order the hosts yourself."
        )
    return notes
