"""The search under fused kernels: grids of layouts, every one evaluated in closed form, nothing skipped.

The order of the loops follows what depends on what. Layers and ends depend on neither the schedule nor the all-to-all;
memory on the schedule and not on the all-to-all; dispatch and combine on neither the schedule nor ZeRO.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from piper_hpc.planner.grid import ANOTHER_NAME, LayoutGrid, Mask, degrees
from piper_hpc.planner.question import ROOMIER, Found, Question, Ranked, domain_tier, front_indices, pareto
from piper_hpc.resource_model.analytical import Stepper, stepper
from piper_hpc.resource_model.analytical.blocks import Parts
from piper_hpc.resource_model.analytical.network import network_of
from piper_hpc.resource_model.analytical.step import Memory, Once, Step, peak_bytes
from piper_hpc.resource_model.topology import Group
from piper_hpc.spec import Execution
from piper_hpc.spec.rules import LAYERS
from piper_hpc.spec.schedules import schedule_problem

Array = npt.NDArray[np.float64]

NO_FIT = "Eq 11: peak memory must fit the rank's memory"
EVERY = "Eq 7: pp must divide the ranks"
NO_PIPELINE = "schedule: needs another number of chunks a rank (vpp), or more than one stage"
FEW = "schedule: needs more micro-batches a step, or a multiple of pp"


@dataclass
class Pipeline:
    """A grid under one schedule: its memory, and the best all-to-all that any of its layouts has had so far.

    runs: layouts that the schedule can run and ZeRO names once, [zero, 1, layouts]; fits: those that also fit.
    """

    grid: LayoutGrid
    memory: Memory
    peak: Array
    runs: Mask
    capacity: float
    best_s: Array = field(init=False)
    best_of: npt.NDArray[np.int8] = field(init=False)
    of_placement: dict[str, Once] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.best_s = np.full(self.grid.shape, np.inf)
        self.best_of = np.zeros(self.grid.shape, dtype=np.int8)

    @cached_property
    def fits(self) -> Mask:
        """What runs and fits."""
        return np.asarray((self.peak <= self.capacity) & self.runs)

    @cached_property
    def counts(self) -> tuple[Any, Any]:
        """How many run, and how many of these fit, by layout along the last dimension."""
        return self.runs.sum(axis=(0, 1)) * len(self.grid.recompute), self.fits.sum(axis=(0, 1))

    def once(self, parts: Parts, grid: LayoutGrid) -> Once:
        """What no algorithm changes, computed once a placement."""
        if grid.placement not in self.of_placement:
            self.of_placement[grid.placement] = Stepper(parts, grid).once(self.memory)
        return self.of_placement[grid.placement]

    def note(self, seconds: Array, allowed: Mask, all_to_all: int) -> None:
        """Remember where this all-to-all, by its number, is the fastest yet."""
        faster = seconds < self.best_s
        faster &= allowed
        np.copyto(self.best_s, seconds, where=faster)
        np.copyto(self.best_of, np.int8(all_to_all), where=faster)


class Best:
    """The `keep` layouts of the lowest scores of all that are offered."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.ranked: list[Ranked] = []

    @property
    def worst(self) -> float:
        """A score above this is not wanted."""
        return self.ranked[-1].score if len(self.ranked) >= self.keep else np.inf

    def offer(self, grid: LayoutGrid, scores: Array, seconds: Array, peak: Array, *masks: Mask) -> None:
        """All of a grid where every mask is true."""
        wanted = scores <= self.worst
        for mask in masks:
            wanted &= mask
        hits = np.flatnonzero(wanted)
        if not len(hits):
            return
        if len(hits) > self.keep:
            order = np.lexsort((seconds.ravel()[hits], scores.ravel()[hits]))
            hits = hits[order[: self.keep]]
        score, step_s, size = (values.ravel()[hits].tolist() for values in (scores, seconds, peak))
        new = [Ranked(score[i], step_s[i], size[i], grid.layout(int(hit))) for i, hit in enumerate(hits)]
        self.ranked = sorted([*self.ranked, *new], key=lambda one: one.key)[: self.keep]


def search(question: Question, execution: Execution) -> Found:
    """Every layout of the axes under `execution`. ResourceModelError where nothing is known of the device."""
    return _Search(question, execution).run()


class _Search:
    def __init__(self, question: Question, execution: Execution) -> None:
        self.question, self.execution = question, execution
        self.axes = question.axes
        self.best, self.inside, self.roomier = Best(question.keep), Best(1), Best(1)
        self.front: list[Ranked] = []
        self.found = Found()
        self.all_to_alls = [
            (placement, algorithm) for placement in self.axes.placement for algorithm in self.axes.all_to_all
        ]
        self.allowed_tier = domain_tier(question.cluster, question.ep_domain)
        self.eq10_tier = domain_tier(question.cluster, "switch")

    def run(self) -> Found:
        for ranks in self.question.ranks:
            front: list[Ranked] = []
            for pp in self.axes.pp:
                front = self._stages(ranks, pp, front)
            self.front += front
        found = self.found
        found.best, found.front = self.best.ranked, pareto(self.front)
        found.inside = next(iter(self.inside.ranked), None)
        found.roomier = next(iter(self.roomier.ranked), None)
        found.rejected = +found.rejected  # without rules that nothing broke
        return found

    def _stages(self, ranks: int, pp: int, front: list[Ranked]) -> list[Ranked]:
        """Everything with `pp` stages; returns the front with what it adds."""
        question, rejected, axes = self.question, self.found.rejected, self.axes
        names = axes.size // len(axes.pp)
        if ranks % pp or pp > question.model.layers:
            rejected[EVERY if ranks % pp else LAYERS] += names
            return front
        grid, broken = degrees(question.model, question.workload, ranks, pp, axes)
        each = names // (len(axes.micro_batch) * len(axes.tp) * len(axes.cp) * len(axes.ep) * len(axes.etp))
        for rule, count in broken.items():
            rejected[rule] += count * each
        if not grid.shape[2]:
            return front
        shared = stepper(question.model, question.cluster, grid, question.workload, self.execution)
        pipelines = list(self._pipelines(grid, shared))
        linear = shared.network.groups
        for number, (placement, algorithm) in enumerate(self.all_to_alls):
            placed = grid.at(placement=placement, all_to_all=algorithm)
            network = shared.network if placement == "linear" else network_of(question.cluster, placed)
            own = placed.is_distinct_all_to_all(axes, network.groups, linear)
            near = _within(network.groups.experts, self.allowed_tier)
            inside = _within(network.groups.experts, self.eq10_tier)
            parts = Parts(shared.parts.blocks, network, algorithm)
            for pipeline in pipelines:
                self._price(ranks, pipeline, parts, placed, number, own, near, inside)
        for pipeline in pipelines:
            front = self._remember(ranks, pipeline, front)
        return front

    def _pipelines(self, grid: LayoutGrid, shared: Stepper) -> Iterator[Pipeline]:
        """The grid under every schedule that it can have, with its memory; the others are counted."""
        question, rejected, axes = self.question, self.found.rejected, self.axes
        all_to_alls = len(self.all_to_alls)
        sharded = grid.sharded()
        only = next((name for name in axes.schedule if schedule_problem(name, 1, 1, 1) is None), None)
        for vpp in axes.vpp:
            for schedule in axes.schedule:
                layouts = int(np.prod(grid.shape)) * all_to_alls
                rule = schedule_problem(schedule, grid.pp, vpp, 2 * grid.pp)
                if grid.pp * vpp > question.model.layers:
                    rejected[LAYERS] += layouts
                elif rule is not None:
                    rejected[NO_PIPELINE] += layouts
                elif grid.pp == 1 and schedule != only:
                    rejected[ANOTHER_NAME] += layouts
                else:
                    scheduled = grid.at(vpp=vpp, schedule=schedule)
                    each = len(grid.recompute) * all_to_alls
                    runs = scheduled.scheduled(question.workload.global_batch)
                    late = int(np.count_nonzero(~runs)) * len(grid.zero) * each
                    rejected[FEW] += late
                    rejected[ANOTHER_NAME] += int(np.count_nonzero(runs & ~sharded)) * each
                    memory = Stepper(shared.parts, scheduled).memory_by_rank()
                    peak = np.array(np.broadcast_to(peak_bytes(memory), grid.shape))
                    once = np.broadcast_to(runs & sharded, (grid.shape[0], 1, grid.shape[2]))
                    yield Pipeline(scheduled, memory, peak, once, question.cluster.memory_bytes)

    def _price(
        self,
        ranks: int,
        pipeline: Pipeline,
        parts: Parts,
        placed: LayoutGrid,
        number: int,
        own: Mask,
        near: Mask,
        inside: Mask,
    ) -> None:
        """One grid under one schedule and one all-to-all: every term, and what becomes of every layout."""
        found = self.found
        run, fit = pipeline.counts
        allowed = np.broadcast_to(own & near, run.shape)
        found.rejected[ANOTHER_NAME] += int(run[~np.broadcast_to(own, run.shape)].sum())
        found.rejected[f"Eq 10: expert groups must stay within ep_domain={self.question.ep_domain}"] += int(
            run[np.broadcast_to(own & ~near, run.shape)].sum()
        )
        if not allowed.any():
            return
        evaluated, fits = int(run[allowed].sum()), int(fit[allowed].sum())
        found.searched += evaluated
        found.fitting += fits
        found.rejected[NO_FIT] += evaluated - fits
        grid = placed.at(vpp=pipeline.grid.vpp, schedule=pipeline.grid.schedule)
        step: Step = Stepper(parts, grid).evaluate(pipeline.once(parts, grid))
        seconds = np.broadcast_to(np.asarray(step.step_time_s), grid.shape)
        pipeline.note(seconds, allowed, number)
        scores = self.question.score(ranks, seconds, pipeline.peak)
        self.best.offer(grid, scores, seconds, pipeline.peak, pipeline.fits, allowed)
        self.inside.offer(grid, scores, seconds, pipeline.peak, pipeline.fits, allowed, inside)

    def _remember(self, ranks: int, pipeline: Pipeline, front: list[Ranked]) -> list[Ranked]:
        """What a grid adds to the front, and to the best with more memory."""
        peak, seconds = pipeline.peak, pipeline.best_s
        scores = self.question.score(ranks, seconds, peak)
        roomy = (peak <= ROOMIER * pipeline.capacity) & pipeline.runs & np.isfinite(seconds)
        before = self.roomier.ranked
        self.roomier.offer(pipeline.grid, scores, seconds, peak, roomy)
        if self.roomier.ranked != before:
            (one,) = self.roomier.ranked
            index = int(np.flatnonzero(roomy & (scores == one.score) & (seconds == one.step_time_s))[0])
            self.roomier.ranked = [self._at(ranks, pipeline, index)]
        feasible = np.flatnonzero(pipeline.fits & np.isfinite(seconds))
        new = feasible[front_indices(seconds.ravel()[feasible], peak.ravel()[feasible], front)]
        return pareto([*front, *(self._at(ranks, pipeline, int(index)) for index in new)])

    def _at(self, ranks: int, pipeline: Pipeline, index: int) -> Ranked:
        placement, algorithm = self.all_to_alls[int(pipeline.best_of.ravel()[index])]
        seconds, peak = float(pipeline.best_s.ravel()[index]), float(pipeline.peak.ravel()[index])
        layout = pipeline.grid.at(placement=placement, all_to_all=algorithm).layout(index)
        return Ranked(float(self.question.score(ranks, seconds, peak)), seconds, peak, layout)


def _within(group: Group, tier: int) -> Mask:
    return np.asarray(group.within(tier) >= group.size)
