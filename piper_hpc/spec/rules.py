"""What makes degrees of parallelism a layout: one table for a layout that is asked for and for a search over many.

Equations are those of arXiv 2605.05049. Rules of degrees are evaluated on arrays, so that a search masks a whole grid
at once; a single layout is a grid of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piper_hpc.spec.all_to_all import ALGORITHMS, AUTO, BASELINES
from piper_hpc.spec.layout import Layout, split_layers
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.problem import Problem
from piper_hpc.spec.recompute import Recompute
from piper_hpc.spec.schedules import schedule_problem
from piper_hpc.spec.workload import Workload

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

DEGREES = ("micro_batch", "tp", "cp", "ep", "etp")
"""Axes of a layout that `DegreeArrays` holds as arrays."""


@dataclass(frozen=True)
class DegreeArrays:
    """Degrees that the rules are evaluated on: one pipeline degree, all else as equally long arrays, [combinations]."""

    model: ModelSpec
    workload: Workload
    stage_ranks: int
    micro_batch: Ints
    tp: Ints
    cp: Ints
    ep: Ints
    etp: Ints

    @staticmethod
    def of(model: ModelSpec, workload: Workload, layout: Layout) -> DegreeArrays:
        """One layout as arrays of length one."""
        degrees = {name: np.array([getattr(layout, name)]) for name in DEGREES}
        return DegreeArrays(model, workload, layout.ranks // layout.pp, **degrees)

    @property
    def sequences(self) -> Ints:
        """Sequences of one micro-batch on all ranks of a stage, [combinations]."""
        return self.micro_batch * (self.stage_ranks // (self.tp * self.cp))


@dataclass(frozen=True)
class Rule:
    """One rule of degrees. text: what a search counts rejections by; holds: DegreeArrays -> bool [combinations].

    key: of the configuration, what to change. Of one layout that breaks it, facts: the numbers that decide; works: an
    override.
    """

    text: str
    key: str
    holds: Callable[[DegreeArrays], Mask]
    facts: Callable[[DegreeArrays], str]
    works: Callable[[DegreeArrays], str]

    def problem(self, degrees: DegreeArrays) -> Problem | None:
        """Of the degrees of one layout: how it breaks this rule; None where it does not."""
        if self.holds(degrees).all():
            return None
        place, name = self.key.split(".")
        value = getattr(degrees.workload, name) if place == "train" else int(getattr(degrees, name)[0])
        return Problem(self.key, value, f"{self.text}; {self.facts(degrees)}", self.works(degrees))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`; 1 at least."""
    return max((each for each in range(1, most + 1) if number % each == 0), default=1)


def _sequences(degrees: DegreeArrays) -> str:
    replicas = degrees.stage_ranks // (degrees.tp[0] * degrees.cp[0])
    return f"a multiple of {degrees.micro_batch[0]} * {replicas} = {degrees.sequences[0]} sequences"


def _batch(degrees: DegreeArrays) -> str:
    share = int(degrees.sequences[0])
    return f"train.global_batch={-(-degrees.workload.global_batch // share) * share}"


RULES = (
    Rule(
        "Eq 7: ep * etp and tp * cp must divide the ranks of a stage",
        "parallelism.ep",
        lambda degrees: (
            (degrees.stage_ranks % (degrees.ep * degrees.etp) == 0)
            & (degrees.stage_ranks % (degrees.tp * degrees.cp) == 0)
        ),
        lambda degrees: (
            f"ep * etp = {degrees.ep[0]} * {degrees.etp[0]}, tp * cp = {degrees.tp[0]} * {degrees.cp[0]} "
            f"on {degrees.stage_ranks} ranks a stage"
        ),
        lambda degrees: "parallelism.ep=1 parallelism.etp=1 parallelism.tp=1 parallelism.cp=1",
    ),
    Rule(
        "Eq 8: ep must divide the experts",
        "parallelism.ep",
        lambda degrees: degrees.model.experts % degrees.ep == 0,
        lambda degrees: f"model.experts = {degrees.model.experts}",
        lambda degrees: f"parallelism.ep={_divisor(degrees.model.experts, int(degrees.ep[0]))} parallelism.dp=null",
    ),
    Rule(
        "tp must divide the heads, and the kv heads or be a multiple of them",
        "parallelism.tp",
        lambda degrees: (
            (degrees.model.heads % degrees.tp == 0)
            & ((degrees.model.kv_heads % degrees.tp == 0) | (degrees.tp % degrees.model.kv_heads == 0))
        ),
        lambda degrees: f"model.heads = {degrees.model.heads}, model.kv_heads = {degrees.model.kv_heads}",
        lambda degrees: f"parallelism.tp={_divisor(degrees.model.kv_heads, int(degrees.tp[0]))}",
    ),
    Rule(
        "tp must divide the dense feed-forwards, etp that of an expert",
        "parallelism.tp",
        lambda degrees: (
            (degrees.model.dense_ffn % degrees.tp == 0)
            & (degrees.model.dense_width % degrees.tp == 0)
            & (degrees.model.expert_ffn % degrees.etp == 0)
        ),
        lambda degrees: (
            f"model.dense_ffn = {degrees.model.dense_ffn}, shared and residual width {degrees.model.dense_width}, "
            f"model.expert_ffn = {degrees.model.expert_ffn} with etp = {degrees.etp[0]}"
        ),
        lambda degrees: "parallelism.tp=1 parallelism.etp=1",
    ),
    Rule(
        "tp * cp must divide the sequence",
        "parallelism.cp",
        lambda degrees: degrees.workload.sequence % (degrees.tp * degrees.cp) == 0,
        lambda degrees: f"train.sequence = {degrees.workload.sequence}, tp * cp = {degrees.tp[0]} * {degrees.cp[0]}",
        lambda degrees: "parallelism.tp=1 parallelism.cp=1",
    ),
    Rule(
        "batch: micro_batch * data-parallel ranks must divide the global batch",
        "train.global_batch",
        lambda degrees: degrees.workload.global_batch % degrees.sequences == 0,
        _sequences,
        _batch,
    ),
)
"""Rules of degrees, in the order in which a search applies them."""

LAYERS = "Eq 9: pp * vpp must not exceed the layers"


def layout_problems(model: ModelSpec, layout: Layout, workload: Workload) -> Iterator[Problem]:
    """Every rule that a layout of `workload` breaks; where values make no sense by themselves, these alone."""
    alone = list(_values(layout))
    if alone:
        yield from alone
        return
    stages = layout.pp * layout.vpp
    if stages > model.layers:
        rule = f"{LAYERS}: pp * vpp = {stages} stages, at most model.layers = {model.layers}"
        yield Problem("parallelism.pp", layout.pp, rule, f"model.layers={stages}")
    split = layout.stage_layers
    if split and (len(split) != stages or min(split) < 1 or sum(split) != model.layers):
        rule = f"must give each of pp * vpp = {stages} stages a layer, and model.layers = {model.layers} in all"
        even = ",".join(str(len(layers)) for layers in split_layers(model.layers, stages))
        yield Problem("parallelism.stage_layers", list(split), rule, f"parallelism.stage_layers=[{even}]")
    if not model.experts and (layout.ep, layout.etp) not in ((1, layout.tp), (1, 1)):
        rule = "a dense model has no experts to spread"
        yield Problem("parallelism.ep", layout.ep, rule, "parallelism.ep=1 parallelism.etp=1")
    degrees = DegreeArrays.of(model, workload, layout)
    broken = [problem for rule in RULES if (problem := rule.problem(degrees)) is not None]
    yield from broken
    if not any(problem.key == "train.global_batch" for problem in broken):
        micro_batches = layout.micro_batches(workload.global_batch)
        if broken_order := schedule_problem(layout.schedule, layout.pp, layout.vpp, micro_batches):
            yield Problem(
                "parallelism.schedule", layout.schedule, broken_order, "parallelism.schedule=1f1b parallelism.vpp=1"
            )


def _values(layout: Layout) -> Iterator[Problem]:
    if layout.zero not in range(4):
        yield Problem("parallelism.zero", layout.zero, "must be 0, 1, 2 or 3", "parallelism.zero=0")
    if layout.micro_batch < 1:
        yield Problem("parallelism.micro_batch", layout.micro_batch, "must be at least 1", "parallelism.micro_batch=1")
    if layout.all_to_all not in (*ALGORITHMS, AUTO, *BASELINES):
        rule = f"must be one of {', '.join((*ALGORITHMS, AUTO, *BASELINES))}"
        yield Problem("parallelism.all_to_all", layout.all_to_all, rule, "parallelism.all_to_all=flat")
    try:
        Recompute.parse(layout.recompute)
    except ValueError as error:
        yield Problem("parallelism.recompute", layout.recompute, str(error), "parallelism.recompute=none")
