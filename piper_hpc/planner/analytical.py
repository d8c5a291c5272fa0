"""The search for executor=megatron: grids of layouts, every one evaluated in closed form, nothing skipped.

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

from piper_hpc.planner.grid import LayoutGrid, Mask, degrees
from piper_hpc.planner.search_spec import (
    DUPLICATE,
    MEMORY_RELAXATION,
    NO_FIT,
    WRONG_MICRO_BATCHES,
    WRONG_VPP,
    RankedLayout,
    SearchResult,
    SearchSpec,
    domain_tier,
    front_indices,
    pareto,
)
from piper_hpc.resource_model.analytical import Stepper, stepper
from piper_hpc.resource_model.analytical.blocks import PlacedBlocks
from piper_hpc.resource_model.analytical.network import network_of
from piper_hpc.resource_model.analytical.step import AlgorithmIndependent, Memory, Step, peak_bytes
from piper_hpc.resource_model.topology import Group
from piper_hpc.spec import Execution
from piper_hpc.spec.rules import LAYERS
from piper_hpc.spec.schedules import schedule_problem

Array = npt.NDArray[np.float64]

PP_DIVIDES_RANKS = "Eq 7: pp must divide the ranks"


@dataclass
class ScheduledGrid:
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
    by_placement: dict[str, AlgorithmIndependent] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.best_s = np.full(self.grid.shape, np.inf)
        self.best_of = np.zeros(self.grid.shape, dtype=np.int8)

    @cached_property
    def fits(self) -> Mask:
        """Layouts that the schedule can run and that fit the memory, bool [zero, recompute, layouts]."""
        return np.asarray((self.peak <= self.capacity) & self.runs)

    @cached_property
    def counts(self) -> tuple[Any, Any]:
        """How many run, and how many of these fit, by layout along the last dimension."""
        return self.runs.sum(axis=(0, 1)) * len(self.grid.recompute), self.fits.sum(axis=(0, 1))

    def algorithm_independent(self, placed_blocks: PlacedBlocks, grid: LayoutGrid) -> AlgorithmIndependent:
        """Costs that no all-to-all algorithm changes, computed once a placement."""
        if grid.placement not in self.by_placement:
            self.by_placement[grid.placement] = Stepper(placed_blocks, grid).algorithm_independent(self.memory)
        return self.by_placement[grid.placement]

    def keep_fastest(self, seconds: Array, allowed: Mask, all_to_all: int) -> None:
        """Remember where this all-to-all, by its number, is the fastest yet."""
        faster = seconds < self.best_s
        faster &= allowed
        np.copyto(self.best_s, seconds, where=faster)
        np.copyto(self.best_of, np.int8(all_to_all), where=faster)


class TopLayouts:
    """The `keep` layouts of the lowest scores of all that are offered."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.ranked: list[RankedLayout] = []

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
        new = [RankedLayout(score[i], step_s[i], size[i], grid.layout(int(hit))) for i, hit in enumerate(hits)]
        self.ranked = sorted([*self.ranked, *new], key=lambda one: one.key)[: self.keep]


def search(spec: SearchSpec, execution: Execution) -> SearchResult:
    """Every layout of the axes under `execution`. ResourceModelError where nothing is known of the device."""
    return _Search(spec, execution).run()


class _Search:
    def __init__(self, spec: SearchSpec, execution: Execution) -> None:
        self.spec, self.execution = spec, execution
        self.axes = spec.axes
        self.best, self.in_domain, self.with_more_memory = TopLayouts(spec.keep), TopLayouts(1), TopLayouts(1)
        self.front: list[RankedLayout] = []
        self.result = SearchResult()
        self.all_to_alls = [
            (placement, algorithm) for placement in self.axes.placement for algorithm in self.axes.all_to_all
        ]
        self.allowed_tier = domain_tier(spec.cluster, spec.ep_domain)
        self.eq_10_tier = domain_tier(spec.cluster, "switch")

    def run(self) -> SearchResult:
        for ranks in self.spec.ranks:
            front: list[RankedLayout] = []
            for pp in self.axes.pp:
                front = self._stages(ranks, pp, front)
            self.front += front
        result = self.result
        result.best, result.front = self.best.ranked, pareto(self.front)
        result.in_domain = next(iter(self.in_domain.ranked), None)
        result.with_more_memory = next(iter(self.with_more_memory.ranked), None)
        result.rejected = +result.rejected  # without rules that nothing broke
        return result

    def _stages(self, ranks: int, pp: int, front: list[RankedLayout]) -> list[RankedLayout]:
        """Everything with `pp` stages; returns the front with what it adds."""
        spec, rejected, axes = self.spec, self.result.rejected, self.axes
        names = axes.size // len(axes.pp)
        if ranks % pp or pp > spec.model.layers:
            rejected[PP_DIVIDES_RANKS if ranks % pp else LAYERS] += names
            return front
        grid, broken = degrees(spec.model, spec.workload, ranks, pp, axes)
        each = names // (len(axes.micro_batch) * len(axes.tp) * len(axes.cp) * len(axes.ep) * len(axes.etp))
        for rule, count in broken.items():
            rejected[rule] += count * each
        if not grid.shape[2]:
            return front
        shared = stepper(spec.model, spec.cluster, grid, spec.workload, self.execution)
        scheduled_grids = list(self._scheduled_grids(grid, shared))
        linear = shared.network.groups
        for number, (placement, algorithm) in enumerate(self.all_to_alls):
            placed = grid.at(placement=placement, all_to_all=algorithm)
            network = shared.network if placement == "linear" else network_of(spec.cluster, placed)
            own = placed.is_distinct_all_to_all(axes, network.groups, linear)
            near = _within(network.groups.experts, self.allowed_tier)
            in_domain = _within(network.groups.experts, self.eq_10_tier)
            placed_blocks = PlacedBlocks(shared.placed_blocks.blocks, network, algorithm)
            for pipeline in scheduled_grids:
                self._evaluate(ranks, pipeline, placed_blocks, placed, number, own, near, in_domain)
        for pipeline in scheduled_grids:
            front = self._update_front(ranks, pipeline, front)
        return front

    def _scheduled_grids(self, grid: LayoutGrid, shared: Stepper) -> Iterator[ScheduledGrid]:
        """The grid under every schedule that it can have, with its memory; the others are counted."""
        spec, rejected, axes = self.spec, self.result.rejected, self.axes
        all_to_alls = len(self.all_to_alls)
        sharded = grid.sharded()
        only = next((name for name in axes.schedule if schedule_problem(name, 1, 1, 1) is None), None)
        for vpp in axes.vpp:
            for schedule in axes.schedule:
                layouts = int(np.prod(grid.shape)) * all_to_alls
                rule = schedule_problem(schedule, grid.pp, vpp, 2 * grid.pp)
                if grid.pp * vpp > spec.model.layers:
                    rejected[LAYERS] += layouts
                elif rule is not None:
                    rejected[WRONG_VPP] += layouts
                elif grid.pp == 1 and schedule != only:
                    rejected[DUPLICATE] += layouts
                else:
                    scheduled = grid.at(vpp=vpp, schedule=schedule)
                    each = len(grid.recompute) * all_to_alls
                    runs = scheduled.scheduled(spec.workload.global_batch)
                    late = int(np.count_nonzero(~runs)) * len(grid.zero) * each
                    rejected[WRONG_MICRO_BATCHES] += late
                    rejected[DUPLICATE] += int(np.count_nonzero(runs & ~sharded)) * each
                    memory = Stepper(shared.placed_blocks, scheduled).memory_by_rank()
                    peak = np.array(np.broadcast_to(peak_bytes(memory), grid.shape))
                    distinct = np.broadcast_to(runs & sharded, (grid.shape[0], 1, grid.shape[2]))
                    yield ScheduledGrid(scheduled, memory, peak, distinct, spec.cluster.memory_bytes)

    def _evaluate(
        self,
        ranks: int,
        pipeline: ScheduledGrid,
        placed_blocks: PlacedBlocks,
        placed: LayoutGrid,
        number: int,
        own: Mask,
        near: Mask,
        in_domain: Mask,
    ) -> None:
        """One grid under one schedule and one all-to-all: every term, and what becomes of every layout."""
        result = self.result
        run, fit = pipeline.counts
        allowed = np.broadcast_to(own & near, run.shape)
        result.rejected[DUPLICATE] += int(run[~np.broadcast_to(own, run.shape)].sum())
        result.rejected[f"Eq 10: expert groups must stay within ep_domain={self.spec.ep_domain}"] += int(
            run[np.broadcast_to(own & ~near, run.shape)].sum()
        )
        if not allowed.any():
            return
        evaluated, fits = int(run[allowed].sum()), int(fit[allowed].sum())
        result.searched += evaluated
        result.fitting += fits
        result.rejected[NO_FIT] += evaluated - fits
        grid = placed.at(vpp=pipeline.grid.vpp, schedule=pipeline.grid.schedule)
        step: Step = Stepper(placed_blocks, grid).evaluate(pipeline.algorithm_independent(placed_blocks, grid))
        seconds = np.broadcast_to(np.asarray(step.step_time_s), grid.shape)
        pipeline.keep_fastest(seconds, allowed, number)
        scores = self.spec.score(ranks, seconds, pipeline.peak)
        self.best.offer(grid, scores, seconds, pipeline.peak, pipeline.fits, allowed)
        self.in_domain.offer(grid, scores, seconds, pipeline.peak, pipeline.fits, allowed, in_domain)

    def _update_front(self, ranks: int, pipeline: ScheduledGrid, front: list[RankedLayout]) -> list[RankedLayout]:
        """What a grid adds to the front, and to the best with more memory."""
        peak, seconds = pipeline.peak, pipeline.best_s
        scores = self.spec.score(ranks, seconds, peak)
        roomy = (peak <= MEMORY_RELAXATION * pipeline.capacity) & pipeline.runs & np.isfinite(seconds)
        before = self.with_more_memory.ranked
        self.with_more_memory.offer(pipeline.grid, scores, seconds, peak, roomy)
        if self.with_more_memory.ranked != before:
            (one,) = self.with_more_memory.ranked
            index = int(np.flatnonzero(roomy & (scores == one.score) & (seconds == one.step_time_s))[0])
            self.with_more_memory.ranked = [self._at(ranks, pipeline, index)]
        feasible = np.flatnonzero(pipeline.fits & np.isfinite(seconds))
        new = feasible[front_indices(seconds.ravel()[feasible], peak.ravel()[feasible], front)]
        return pareto([*front, *(self._at(ranks, pipeline, int(index)) for index in new)])

    def _at(self, ranks: int, pipeline: ScheduledGrid, index: int) -> RankedLayout:
        placement, algorithm = self.all_to_alls[int(pipeline.best_of.ravel()[index])]
        seconds, peak = float(pipeline.best_s.ravel()[index]), float(pipeline.peak.ravel()[index])
        layout = pipeline.grid.at(placement=placement, all_to_all=algorithm).layout(index)
        return RankedLayout(float(self.spec.score(ranks, seconds, peak)), seconds, peak, layout)


def _within(group: Group, tier: int) -> Mask:
    return np.asarray(group.within(tier) >= group.size)
