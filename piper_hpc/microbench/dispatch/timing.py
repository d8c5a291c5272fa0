"""Timing of dispatch and combine: all variants of a cell in turn within each iteration, one result of each checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.comm.volume import Sent, volume
from piper_hpc.microbench.dispatch.cells import Cell, CheckResult, Row, Variant, row
from piper_hpc.microbench.dispatch.runner import VariantRunner
from piper_hpc.microbench.timing import REST_S, Budget, Team
from piper_hpc.spec import FLAT, LEVELS, ExpertPlacement
from piper_hpc.spec.routing_workloads import draw, reach_probability_by_domain, source_tokens

MIN_ITERATIONS = 6
"""Iterations that a cell gets whatever its share of the time: three in each half."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
"""Of the result against flat's, relative to its norm: sums are taken in another order."""

LinkBytes = Callable[[], int]
"""Bytes that have left this rank's node so far."""

Array = npt.NDArray[np.float64]


def time_cells(
    bench: Bench, cells: Sequence[Cell], *, iterations: int, budget_s: float, on_row: Callable[[Row], None]
) -> None:
    """Measure every variant in every cell, in `budget_s` seconds altogether; collective over the default group.

    iterations: of each variant in a cell, fewer where the cell's share of the budget ends before; on_row: called on
    rank 0 with the rows of each cell as it is done.
    """
    budget = Budget(budget_s, len(cells))
    for cell in cells:
        for found in bench.measure(cell, iterations, budget.share()):
            if bench.team.rank == 0:
                on_row(found)
        budget.spend()


class Bench:
    """Variants over expert groups that dispatch at the same time, made ready once for many cells.

    factories: of groups that have no rank in common; a rank of none only waits. others: channels over which flat is run
    under another name, where one group has all ranks; link_bytes: a counter of this node's link, likewise; extra: what
    every row has beside. Collective over the default group, as are its methods.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        factories: Sequence[DispatcherFactory],
        device: torch.device,
        *,
        others: Mapping[str, Channel] | None = None,
        link_bytes: LinkBytes | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.team, self.variants, self.factories = Team(device), variants, factories
        self._own = next((factory for factory in factories if self.team.rank in factory.ranks), None)
        self._others, self._link_bytes, self._extra = others or {}, link_bytes, extra or {}
        self._runners = [self._runner(variant) for variant in variants]
        # Results are held against those of flat.
        self._reference = self._runner(Variant(FLAT.name))

    def _runner(self, variant: Variant) -> VariantRunner | None:
        made = None
        for factory in self.factories:
            if factory is self._own:
                made = VariantRunner(variant, factory, self._others)
            elif variant.algorithm not in self._others:
                factory.join(variant.algorithm)
        return made

    @torch.no_grad()
    def measure(self, cell: Cell, iterations: int, share_s: float) -> list[Row]:
        """Rows of all variants, the same on every rank: of the first group, with the time of the slowest rank of any
        group for a call that all began together.

        iterations: LEAST or more; fewer than asked where `share_s` seconds are over before. Raises ValueError where the
        experts do not divide over the ranks of a group.
        """
        load = None if self._own is None else _CellInputs(cell, self._own, self.team)
        checked = self._check(load)
        started = perf_counter()
        self._round(load, 0, range(len(self.variants)))
        round_s, share_s = self.team.maximum(perf_counter() - started, share_s)
        # The check and the round before have had their part of the share.
        count = max(MIN_ITERATIONS, min(iterations, int(share_s / round_s) - 2) // 2 * 2)
        samples = np.empty((count, 3, len(self.variants)))
        for iteration in range(count):
            # Another order each time, the same on all ranks: no variant always follows the same one.
            order = np.random.default_rng(iteration).permutation(len(self.variants))
            samples[iteration] = self._round(load, iteration, order)
        table = self.team.table(samples.reshape(-1).tolist()).reshape(-1, *samples.shape)
        slowest, spent = table[:, :, 0].max(axis=0), table[self._dispatching, :, 1:].mean(axis=0)
        more = {"concurrent_groups": len(self.factories), **self._extra}
        return [
            row(cell, variant, self.group, slowest[:, index].tolist(), checked[index],
                formula_bytes=_formula_bytes(cell, variant, self.factories[0].places),
                **self._of_cpu_ranks(spent[:, :, index]), **more)
            for index, variant in enumerate(self.variants)
        ]  # fmt: skip

    @property
    def _dispatching(self) -> list[int]:
        return [rank for factory in self.factories for rank in factory.ranks]

    def _of_cpu_ranks(self, spent_s: Array) -> dict[str, float]:
        """What a row of CPU ranks says of where a mean one computes and is idle, [iterations, 2]."""
        if self.team.device.type != "cpu":
            return {}
        computed_s, idle_s = np.median(spent_s, axis=0).tolist()
        return {"computed_s": computed_s, "idle_s": idle_s, "core_share": self.team.core_share}

    @cached_property
    def group(self) -> dict[str, int]:
        """Ranks, nodes and racks of the first group."""
        places = self.factories[0].places
        return {"ranks": places.ranks, "nodes": len(set(_nodes(places))), "racks": len(set(places.rack_of_rank))}

    def _round(self, load: _CellInputs | None, iteration: int, order: Iterable[int]) -> Array:
        """What one call of each variant takes of this rank, in the order of `Spent`, [3, variants]."""
        seconds = np.zeros((3, len(self.variants)))
        routing = load.routing(iteration) if load else None
        for index in order:
            # A CPU rank's quota is whole again after a rest: no variant pays for the one before it.
            sleep(REST_S if self.team.device.type == "cpu" else 0.0)
            self.team.barrier()
            runner = self._runners[index]
            if runner and load and routing:
                spent = self.team.spent(partial(runner.run, load.tokens, *routing, load.placement))
                seconds[:, index] = spent.seconds, spent.computed_s, spent.idle_s
        return seconds

    def _check(self, load: _CellInputs | None) -> list[CheckResult]:
        """By variant: what one dispatch of the first group sends, and whether the results of all groups are right."""
        found = []
        expected = load.result(self._reference)[0] if load else None
        nodes = max(len(set(_nodes(factory.places))) for factory in self.factories)
        for runner in self._runners:
            to_node, by_level, metadata, wrong = np.zeros(nodes), np.zeros(len(LEVELS)), np.zeros(len(LEVELS)), False
            self.team.barrier()
            before = self._link_bytes() if self._link_bytes else 0
            if load and expected is not None:
                result, sent = load.result(runner)
            self.team.barrier()
            link = self._link_bytes() - before if self._link_bytes else 0
            if load and expected is not None:
                wrong = load.differs(result, expected)
                to_node, by_level, metadata = load.sent_bytes(sent, nodes)
            found.append(self._checked(np.concatenate([to_node, by_level, metadata, [link, wrong]]), nodes))
        return found

    def _checked(self, mine: Array, nodes: int) -> CheckResult:
        """From every rank's own: bytes to each node, by level, metadata by level, on its link; wrong or not."""
        table, first = self.team.table(mine.tolist()), self.factories[0]
        of_group = table[list(first.ranks)]
        to_node, by_level, metadata, link = np.split(of_group, np.cumsum([nodes, len(LEVELS), len(LEVELS)]), axis=1)
        node_of_rank = _nodes(first.places)
        ranks_of = [[r for r, node in enumerate(node_of_rank) if node == each] for each in dict.fromkeys(node_of_rank)]
        return CheckResult(
            payload_bytes=dict(zip(LEVELS, by_level.sum(0).tolist(), strict=True)),
            metadata_bytes=dict(zip(LEVELS, metadata.sum(0).tolist(), strict=True)),
            between_nodes_bytes=[to_node[ranks].sum(0)[: len(ranks_of)].tolist() for ranks in ranks_of],
            link_bytes=[float(link[ranks[0], 0]) for ranks in ranks_of] if self._link_bytes else [],
            correct=not table[:, -1].any(),
        )


class _CellInputs:
    """One cell as a rank of its group has it: tokens, their routing step by step, and where experts are."""

    def __init__(self, cell: Cell, factory: DispatcherFactory, team: Team) -> None:
        self._cell, self._places, self._device = cell, factory.places, team.device
        self._rank, self._ranks = factory.ranks.index(team.rank), factory.places.ranks
        self.placement = ExpertPlacement.linear(cell.experts, self._ranks)
        held = source_tokens(cell.workload, ranks=self._ranks, tokens=cell.tokens)[self._rank]
        values = torch.randn(held, cell.hidden, generator=torch.Generator().manual_seed(self._rank))
        self.tokens = values.to(device=team.device, dtype=getattr(torch, cell.dtype))
        self._routings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def routing(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids and weights of one iteration, both [tokens, top_k]."""
        step = self._cell.step(iteration)
        if step not in self._routings:
            self._routings[step] = self._drawn(step)
        return self._routings[step]

    def _drawn(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        cell = self._cell
        ids, weights = draw(cell.workload, experts=cell.experts, top_k=cell.top_k, ranks=self._ranks,
                            tokens=cell.tokens, rank=self._rank, step=step)  # fmt: skip
        device = self._device
        return torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device=device, dtype=self.tokens.dtype)

    def result(self, runner: VariantRunner | None) -> tuple[torch.Tensor, Sequence[Sent]]:
        """Combined tokens [tokens, hidden] of the first iteration by a variant, and what this rank sent in dispatch."""
        assert runner is not None
        return runner.check(self.tokens, *self.routing(0), self.placement, self._rank)

    def differs(self, result: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether a result [tokens, hidden] is off by more than TOLERANCE, or NaN: sums may be in another order."""
        wide = expected.double()
        error = float((result.double() - wide).norm())
        return not error <= TOLERANCE[self._cell.dtype] * float(wide.norm())

    def sent_bytes(self, sent: Sequence[Sent], nodes: int) -> tuple[Array, Array, Array]:
        """Payload to each node of the group, [nodes], payload by level and metadata by level, [levels]."""
        node_of_rank, row_bytes = _nodes(self._places), self._cell.row_bytes
        in_order = list(dict.fromkeys(node_of_rank))
        to_node = np.zeros(nodes)
        for each in sent:
            to_node[in_order.index(node_of_rank[each.peer])] += each.rows * row_bytes
        weight_bytes = self.tokens.element_size()
        traffic = volume(sent, self._places, self._rank, row_bytes=row_bytes, weight_bytes=weight_bytes)
        return (
            to_node,
            np.array([traffic[level].payload_bytes for level in LEVELS], float),
            np.array([traffic[level].metadata_bytes for level in LEVELS], float),
        )


def _nodes(places: Places) -> list[tuple[int, int]]:
    """Rack and node of each rank: nodes of two racks may have one number."""
    return list(zip(places.rack_of_rank, places.node_of_rank, strict=True))


def _formula_bytes(cell: Cell, variant: Variant, places: Places) -> float | None:
    """Payload of a mean rank between nodes by r(N), for halo_dedup; None for other algorithms and for uneven nodes."""
    nodes = _nodes(places)
    per_node = set(Counter(nodes).values())
    if variant.algorithm != "halo_dedup" or len(per_node) > 1:
        return None
    in_order = list(dict.fromkeys(nodes))
    inside = reach_probability_by_domain(
        cell.workload, experts=cell.experts, top_k=cell.top_k, domains=len(in_order), step=cell.step(0)
    )  # fmt: skip
    held = source_tokens(cell.workload, ranks=places.ranks, tokens=cell.tokens)
    rows = sum(tokens * (sum(inside) - inside[in_order.index(node)]) for tokens, node in zip(held, nodes, strict=True))
    return rows * cell.row_bytes / places.ranks
