"""Grids of all layouts of one pipeline degree as arrays: which combinations are valid, and which rules others break.

A grid has three dimensions, [zero, recompute, degrees]: the last one lists all combinations of micro-batch, tp, cp, ep
and etp that are layouts, since most of what could be combined is none. What does not depend on a dimension is never
computed along it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from piper_hpc.planner.axes import Axes
from piper_hpc.resource_model.topology import NODE, AxisGroups, Group
from piper_hpc.spec import ALGORITHMS, FLAT, TIERS, Algorithm, Layout, ModelSpec, Recompute, Workload
from piper_hpc.spec.rules import DEGREES, RULES, DegreeArrays, Ints, Mask
from piper_hpc.spec.schedules import schedule_problem


@dataclass(frozen=True)
class LayoutGrid:
    """Layouts that share pp, vpp, schedule, algorithm and placement; satisfies spec.Degrees.

    micro_batch, tp, cp, ep, etp: [layouts]; zero: [zero, 1, 1]; recomputed: each part [recompute, 1].
    """

    pp: int
    vpp: int
    schedule: str
    all_to_all: str
    placement: str
    stage_ranks: int
    micro_batch: Ints
    tp: Ints
    cp: Ints
    ep: Ints
    etp: Ints
    zero: Ints
    recompute: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layouts along each dimension."""
        return len(self.zero), len(self.recompute), len(self.tp)

    @cached_property
    def dp(self) -> Ints:
        """Replicas of an expert."""
        return self.stage_ranks // (self.ep * self.etp)

    @cached_property
    def dense_dp(self) -> Ints:
        """Data-parallel ranks of everything else."""
        return self.stage_ranks // (self.tp * self.cp)

    @cached_property
    def recomputed(self) -> Recompute:
        """What is computed again, a column of 0 and 1 for every part."""
        chosen = [Recompute.parse(text) for text in self.recompute]
        flags = {
            field.name: np.array([[getattr(one, field.name)] for one in chosen], dtype=float)
            for field in fields(Recompute)
        }
        # What nobody recomputes stays a number: it costs no array.
        return Recompute(**{name: flag if flag.any() else 0 for name, flag in flags.items()})

    def micro_batches(self, global_batch: int) -> Ints:
        """Micro-batches of a step, [layouts]."""
        return global_batch // (self.micro_batch * self.dense_dp)

    def at(self, **scalars: Any) -> LayoutGrid:
        """The same degrees with another vpp, schedule, algorithm or placement."""
        return replace(self, **scalars)

    def layout(self, index: int) -> Layout:
        """The layout at an index of the flattened grid."""
        z, r, v = np.unravel_index(index, self.shape)
        return Layout(
            pp=self.pp,
            vpp=self.vpp,
            ep=int(self.ep[v]),
            etp=int(self.etp[v]),
            tp=int(self.tp[v]),
            cp=int(self.cp[v]),
            dp=int(self.dp[v]),
            zero=int(self.zero[z, 0, 0]),
            schedule=self.schedule,
            micro_batch=int(self.micro_batch[v]),
            recompute=self.recompute[r],
            all_to_all=self.all_to_all,
            placement=self.placement,
        )

    # Combinations that are no layouts of their own; each mask broadcasts to the grid's shape.

    def sharded(self) -> Mask:
        """Where ZeRO shards anything: with nobody to shard over, its stages are names of the same layout."""
        alone = (self.dense_dp * self.cp == 1) & (self.dp == 1)
        return np.asarray(~alone | (self.zero == self.zero.min()))

    def is_distinct_all_to_all(self, axes: Axes, groups: AxisGroups, linear: AxisGroups) -> Mask:
        """Where algorithm and placement are not another name for an earlier one of `axes`, bool [layouts].

        Inside one node every algorithm is flat, and one of three levels is one of two where no level lies between nodes
        and the whole group; strided ranks stand as `linear` ones do where the group falls back to them.
        """
        levels = all_to_all_levels(groups.experts)
        first = [
            self.all_to_all == next(name for name in axes.all_to_all if _effect(name, level) == effect)
            for level in (1, 2, 3)
            for effect in (_effect(self.all_to_all, level),)
        ]
        own = np.array(first)[levels - 1]
        if self.placement == "linear" or "linear" not in axes.placement:
            return own
        same = [np.asarray(a == b) for a, b in zip(groups.experts.peers, linear.experts.peers, strict=True)]
        return own & ~np.logical_and.reduce(np.broadcast_arrays(*same))

    def scheduled(self, global_batch: int) -> Mask:
        """Where the schedule runs with that many micro-batches, [layouts]."""
        counts, where = np.unique(self.micro_batches(global_batch), return_inverse=True)
        runs = [schedule_problem(self.schedule, self.pp, self.vpp, int(count)) is None for count in counts]
        return np.array(runs)[where]


def _effect(name: str, levels: int) -> Algorithm:
    """What an algorithm is in a group of so many levels: algorithms of equal effect are one."""
    if levels == 1:
        return FLAT
    algorithm = ALGORITHMS[name]
    domains = tuple(domain for domain in algorithm.domains if domain != "rack" or levels == 3)
    return replace(algorithm, name="", domains=domains)


def all_to_all_levels(group: Group) -> Ints:
    """1 for a group inside a node, 2 across nodes, 3 where a switch or a rack holds several of its nodes, not all."""
    node, size = group.within(NODE), group.size
    switch, rack = (group.within(TIERS.index(name)) for name in ("switch", "rack"))
    between = ((switch > node) & (switch < size)) | ((rack > node) & (rack < size))
    return np.asarray(1 + (size > node) * 1 + ((size > node) & between) * 1)


def degrees(model: ModelSpec, workload: Workload, ranks: int, pp: int, axes: Axes) -> tuple[LayoutGrid, Counter[str]]:
    """All layouts of `pp` stages on `ranks` (linear, flat, 1f1b; see `LayoutGrid.at`), `pp` a divisor of `ranks`.

    The counter has the combinations of micro-batch, tp, cp, ep and etp that are none, by the first rule they break.
    """
    columns = np.meshgrid(*(np.array(getattr(axes, name), dtype=np.int64) for name in DEGREES), indexing="ij")
    of_axis = {name: column.ravel() for name, column in zip(DEGREES, columns, strict=True)}
    broken: Counter[str] = Counter()
    for rule in RULES:
        kept = rule.holds(DegreeArrays(model, workload, ranks // pp, **of_axis))
        if not kept.all():
            broken[rule.text] = int(np.count_nonzero(~kept))
            # Later rules see only what kept the earlier ones.
            of_axis = {name: column[kept] for name, column in of_axis.items()}
    grid = LayoutGrid(
        pp=pp,
        vpp=1,
        schedule="1f1b",
        all_to_all="flat",
        placement="linear",
        stage_ranks=ranks // pp,
        zero=np.array(axes.zero, dtype=np.int64).reshape(-1, 1, 1),
        recompute=axes.recompute,
        **of_axis,
    )
    return grid, broken
