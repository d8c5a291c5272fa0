"""The dispatch suite: every all-to-all algorithm under every load on every kind of group that training can form.

What `parallelism.all_to_all=auto` chooses from: by group, size, top_k and imbalance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.microbench.box import TimeBox
from piper_hpc.microbench.dispatch.cells import Cell, Row, Variant, name_of
from piper_hpc.microbench.dispatch.timing import Bench
from piper_hpc.microbench.groups import GroupFamily, group_families
from piper_hpc.spec import ALGORITHMS, CHUNKS, Algorithm, ModelSpec, RankMap
from piper_hpc.spec.routing_workloads import WORKLOADS

TOKENS = (4, 64, 1024)
"""Of a rank: from latency to bandwidth."""
SWEPT = ("W0", "W2")
"""Loads of which every size is measured, balanced and with one hot rank; of the others the middle one."""
TOP_KS = (1, 2)
"""Beside the model's own, at the middle size: without and with little to share among experts."""
ITERATIONS = 20


def series_of(model: ModelSpec, dtype: str) -> list[list[Cell]]:
    """What is measured on every kind of group: cells that differ in size alone, small ones first."""
    middle = TOKENS[1:2]
    wanted = [(load, model.top_k, TOKENS if load in SWEPT else middle) for load in WORKLOADS]
    wanted += [(SWEPT[0], top_k, middle) for top_k in TOP_KS if top_k < model.top_k]
    return [
        [Cell(load, model.experts, top_k, tokens, model.hidden, dtype) for tokens in sizes]
        for load, top_k, sizes in wanted
    ]


def variants_of(places: Places) -> list[Variant]:
    """The algorithms whose levels all mean something on the places of a group, those of fewest levels first."""
    nodes = len(set(zip(places.rack_of_rank, places.node_of_rank, strict=True)))
    levels = 1 + (nodes > 1) + (1 < len(set(places.rack_of_rank)) < nodes)
    return [
        Variant(algorithm.name, chunks)
        for algorithm in sorted(ALGORITHMS.values(), key=lambda algorithm: algorithm.levels)
        if algorithm.levels <= levels
        for chunks in chunks_of(algorithm)
    ]


def chunks_of(algorithm: Algorithm) -> tuple[int, ...]:
    """Chunks that an algorithm is timed with: 0 where it has none, 1 where they could overlap nothing; deduplicated
    HALO also with 1, to show what chunks bring."""
    if not algorithm.domains:
        return (0,)
    if algorithm.levels == 1:
        return (1,)
    return (1, CHUNKS) if algorithm == ALGORITHMS["halo_dedup"] else (CHUNKS,)


@dataclass
class DispatchSuite:
    """One pass over all kinds of groups; every rank makes it, rank 0's caller is given the rows.

    cell_s: seconds that a variant may take in a cell; done: name -> row of what need not be measured again; timeout: of
    the groups that are made; extra: what every row has beside. `left_out`: cell -> why, afterwards.
    """

    ranks: RankMap
    device: torch.device
    cell_s: float
    on_row: Callable[[Row], None]
    done: Mapping[str, Row]
    timeout: timedelta
    extra: Mapping[str, Any] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, model: ModelSpec, dtype: str) -> None:
        """Measure with the model's experts and width. Raises ValueError where its experts do not divide over a group's
        ranks."""
        for family in group_families(self.ranks):
            self._of(family, series_of(model, dtype))

    def _of(self, kind: GroupFamily, all_series: Sequence[Sequence[Cell]]) -> None:
        factories = [DispatcherFactory(Places.of(self.ranks, group), group, self.timeout) for group in kind.groups]
        extra = {"tier": kind.tier, "ranks": list(kind.groups[0]), **self.extra}
        bench = Bench(variants_of(factories[0].places), factories, self.device, extra=extra)
        rate = 0.0
        for series in all_series:
            # What the first series shows of the machine tells whether a single cell of another fits.
            box = TimeBox(self.cell_s, rate)
            for cell in series:
                self._cell(bench, cell, box)
            rate = rate or box.last_rate
        dist.barrier()
        for factory in factories:
            factory.close()

    def _cell(self, bench: Bench, cell: Cell, box: TimeBox) -> None:
        names, work = [name_of(cell, variant, bench.group) for variant in bench.variants], float(cell.logical_bytes)
        found = [self.done[name] for name in names if name in self.done]
        if len(found) < len(names):
            if not box.fits(work):
                self.left_out[names[0].replace(bench.variants[0].algorithm, "*", 1)] = box.reason(work)
                return
            found = bench.measure(cell, ITERATIONS, self.cell_s * len(names))
            for row in found if bench.team.rank == 0 else ():
                self.on_row(row)
        box.add(work, sum(row["min_s"] for row in found) / len(found))
