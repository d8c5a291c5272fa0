"""The calibration suite: all operators and exchanges that a prediction asks for, within one budget of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.microbench.arrival_skew import time_arrival_skew
from piper_hpc.microbench.exchanges import BUS_FACTOR, COLLECTIVES, Exchange, no_exchange, process_group, round_trip
from piper_hpc.microbench.groups import GroupFamily, group_families, pair_families, pairs
from piper_hpc.microbench.operators import build
from piper_hpc.microbench.overhead import neighbour_exchange, time_overhead
from piper_hpc.microbench.rows import OnRow, RowWriter
from piper_hpc.microbench.shapes import Grid, grid_for
from piper_hpc.microbench.timing import Budget, Call, Team, Timing, time_compute, time_exchange
from piper_hpc.spec import RankMap

ARRIVAL_SKEW_POINTS = 6
"""A point of skew is measured as long as so many others: it is the mean of times with a heavy tail."""

OVERHEAD_POINTS = 6
"""Likewise: a small difference of two times."""

UNIT_POINTS, UNIT_S = 3, 0.3
"""Of what compute before a meeting is counted in, and how long it is measured at least: samples that span no whole
periods of a quota make it up to ten times too long, and skew is laid beside ten times the compute."""

ROUNDS, ROUND_S = 3, 6.0
"""Every point is measured so often, far apart, where the budget gives each round so many seconds: what disturbs a
machine for a second then disturbs one row of three, and a calibration takes their median."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LONG_CALL = 3
"""A message whose one call takes more than so many points' share of the budget is left out, and all larger ones. Below
that it is worth its time: what a byte costs is told by the last of a curve."""

CALIBRATED = ("all_to_all", "all_reduce", "all_gather")
"""The collectives that predictions ask for."""


def run(
    *,
    ranks: RankMap,
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
    on_row: OnRow,
    node_names: Sequence[str] = (),
    rack_names: Sequence[str] = (),
    cores_per_rank: float | None = None,
) -> None:
    """Measure every operator on the ranks of the default process group; every rank calls this.

    ranks: where each rank stands (its layout matters only for the number of ranks); device, dtype: of every tensor;
    budget_s: seconds to spend in all, a guide that slow links exceed: each curve keeps its smallest messages;
    on_row: called on rank 0 with each finished row of `measurements.jsonl`, so that a killed run keeps its rows;
    node_names, rack_names: names for the rows, by index of node and rack (default: the index); cores_per_rank: see
    timing.Team.

    Compute operators run on all ranks at once and a row holds the statistics over all ranks; a sample of an exchange
    is the mean over a group, as terms of a step are over a stage, one of skew is any rank. Raises ValueError for a
    dtype without grouped GEMM or a placement of another size.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: F.grouped_mm takes float32, bfloat16 or float16; use torch.float32")
    if len(ranks.places) != dist.get_world_size():
        raise ValueError(
            f"ranks: the placement holds {len(ranks.places)} ranks, the process group {dist.get_world_size()}; "
            f"use a layout of {dist.get_world_size()} ranks"
        )
    if budget_s <= 0:
        raise ValueError(f"budget_s={budget_s}: must be above 0 seconds, for example 7")
    grid = grid_for(device.type)
    families = group_families(ranks)
    points = sum(len(shapes) for shapes in grid.compute.values()) + sum(
        len(sizes) * (len(pairs(ranks)) if name == "p2p" else len(families)) for name, sizes in grid.messages.items()
    )
    points += bool(families) * UNIT_POINTS
    points += len(_nearest(families)) * ARRIVAL_SKEW_POINTS * len(grid.arrival_skew)
    points += len(pairs(ranks)) * OVERHEAD_POINTS * len(grid.overhead)
    row_writer = RowWriter(Team(device, cores_per_rank), ranks, dtype, on_row, node_names, rack_names)
    rounds = max(1, min(ROUNDS, int(budget_s / ROUND_S)))
    for _ in range(rounds):
        _Suite(row_writer, device, grid, Budget(budget_s / rounds, points)).run(families)


class _Suite:
    """One pass over a grid: builds what is measured, times it with the others, and writes the rows on rank 0."""

    def __init__(self, row_writer: RowWriter, device: torch.device, grid: Grid, budget: Budget) -> None:
        self.row_writer, self.device, self.grid, self.budget = row_writer, device, grid, budget
        self.ranks, self.dtype, self.team = row_writer.ranks, row_writer.dtype, row_writer.team

    def run(self, families: Sequence[GroupFamily]) -> None:
        self.measure_compute()
        for tier, pair in pairs(self.ranks).items():
            self.measure_p2p(tier, pair)
        if not families:
            return
        work, work_s = self.time_smallest_gemm()
        for pair_family in pair_families(self.ranks):
            self.measure_overhead(pair_family, work, work_s)
        nearest = _nearest(families)
        for family in families:
            with process_group(family) as group:
                together_s = {name: self.measure_collective(name, family, group) for name in CALIBRATED}
                if family in nearest:
                    self.measure_arrival_skew(family, group, together_s["all_to_all"], work, work_s)

    def measure_compute(self) -> None:
        # What is loaded and allocated once, at an operator's first use, belongs to no operator's share.
        for name, shapes in self.grid.compute.items():
            build(name, shapes[0], self.device, self.dtype)
        for name, shapes in self.grid.compute.items():
            for shape in shapes:
                operator = build(name, shape, self.device, self.dtype)
                timing = time_compute(operator.call, self.team, self.budget.share())
                self.budget.spend()
                everyone = range(self.team.world)
                self.row_writer.write(name, operator.work, operator.unit, shape, timing, not operator.correct, everyone)

    def measure_p2p(self, tier: str, pair: tuple[int, int]) -> None:
        def prepare(elements: int) -> Exchange:
            return round_trip(pair, elements, self.device, self.dtype) if self.team.rank in pair else no_exchange()

        family = GroupFamily(2, tier, (pair,))
        self.measure_sizes("p2p", f"p2p/{tier}", family, prepare, calls_per_message=0.5)

    def measure_collective(self, name: str, family: GroupFamily, group: dist.ProcessGroup | None) -> float:
        """One curve; returns the median seconds of the smallest message."""
        members = next((group for group in family.groups if self.team.rank in group), None)

        def prepare(elements: int) -> Exchange:
            if members is None:
                return no_exchange()
            return COLLECTIVES[name](group, members, elements, self.device, self.dtype)

        return self.measure_sizes(name, f"{name}/{family.tier}/{family.size}", family, prepare)

    def time_smallest_gemm(self) -> tuple[Call, float]:
        """The smallest GEMM, which compute before a collective repeats, and its mean seconds on all ranks at once."""
        call = build("gemm", self.grid.compute["gemm"][0], self.device, self.dtype).call
        timing = time_compute(call, self.team, max(UNIT_S, self.budget.share(UNIT_POINTS)))
        self.budget.spend(UNIT_POINTS)
        return call, float(timing.samples.mean())

    def measure_overhead(self, family: GroupFamily, work: Call, work_s: float) -> None:
        """What one end of a message costs ranks that compute: half of the exchange that each pair makes both ways."""
        peers = {rank: sum(pair) - rank for pair in family.groups for rank in pair}
        item = torch.empty((), dtype=self.dtype).element_size()
        for size in self.grid.overhead:
            elements = size // item
            post, wrong = neighbour_exchange(peers.get(self.team.rank), elements, self.device, self.dtype)
            both = time_overhead(work, work_s, post, self.team, self.budget.share(OVERHEAD_POINTS))
            self.budget.spend(OVERHEAD_POINTS)
            self.row_writer.write(
                f"overhead/{family.tier}",
                float(size),
                "bytes",
                {"elements": elements},
                Timing(both.samples[family.ranks] / 2, both.iterations),
                wrong,
                family.ranks,
                group_size=family.size,
                tier=family.tier,
                concurrent_groups=len(family.groups),
            )

    def measure_arrival_skew(
        self, family: GroupFamily, group: dist.ProcessGroup | None, together_s: float, work: Call, work_s: float
    ) -> None:
        """Mean extra time of the smallest all-to-all over `together_s`, by the seconds that busy ranks need before it.

        It follows the size of a group and hardly its links, since the message is small: each size is measured on its
        nearest tier alone.
        """
        members = next((group for group in family.groups if self.team.rank in group), None)
        item = torch.empty((), dtype=self.dtype).element_size()
        elements = -(-self.grid.messages["all_to_all"][0] // (item * family.size)) * family.size
        exchange, wrong = no_exchange()
        if members is not None:
            exchange, wrong = COLLECTIVES["all_to_all"](group, members, elements, self.device, self.dtype)
        for seconds in self.grid.arrival_skew:
            calls = max(1, round(seconds / work_s))

            def compute(calls: int = calls) -> None:
                for _ in range(calls):
                    work()

            timing = time_arrival_skew(compute, exchange, together_s, self.team, self.budget.share(ARRIVAL_SKEW_POINTS))
            self.budget.spend(ARRIVAL_SKEW_POINTS)
            self.row_writer.write(
                f"skew/{family.tier}/{family.size}",
                calls * work_s,
                "seconds",
                {"gemms": calls, "elements": elements},
                Timing(timing.samples[family.ranks], timing.iterations),
                wrong,
                family.ranks,
                statistic="mean",  # a step adds many exchanges up, and their sum follows the mean
                together_s=together_s,
                group_size=family.size,
                tier=family.tier,
                concurrent_groups=len(family.groups),
            )

    def measure_sizes(
        self,
        name: str,
        operator: str,
        family: GroupFamily,
        prepare: Callable[[int], Exchange],
        calls_per_message: float = 1.0,
    ) -> float:
        """One curve over message sizes; ends early where one call of the next size would take LONG_CALL shares.

        Returns the median seconds of the smallest message.
        """
        item = torch.empty((), dtype=self.dtype).element_size()
        sizes = self.grid.messages[name]

        def of_groups(samples: np.ndarray) -> np.ndarray:
            return np.stack([samples[list(group)].mean(axis=0) for group in family.groups]) * calls_per_message

        previous_bytes, previous_s, medians = 0, 0.0, []
        for index, size in enumerate(sizes):
            elements = -(-size // (item * family.size)) * family.size  # whole parts for all_to_all
            call, wrong = prepare(elements)
            timing = time_exchange(call, self.team, self.budget.share())
            self.budget.spend()
            idle: dict[str, Any] = {} if timing.idle is None else {"idle_s": float(np.median(of_groups(timing.idle)))}
            timing = Timing(of_groups(timing.samples), timing.iterations)
            statistics = timing.statistics()
            medians.append(float(statistics["median_s"]))
            bytes_ = elements * item
            self.row_writer.write(
                operator,
                float(bytes_),
                "bytes",
                {"elements": elements},
                timing,
                wrong,
                family.ranks,
                group_size=family.size,
                tier=family.tier,
                concurrent_groups=len(family.groups),
                busbw_bytes_per_s=bytes_ / statistics["median_s"] * BUS_FACTOR[name](family.size),
                **idle,
            )
            # The fastest samples tell the cost of a byte; others tell of ranks that were woken up late.
            fastest_s, left = statistics["min_s"], sizes[index + 1 :]
            if left and previous_bytes:
                per_byte_s = max(0.0, fastest_s - previous_s) / (bytes_ - previous_bytes)
                next_s = (fastest_s + per_byte_s * (left[0] - bytes_)) / calls_per_message
                if next_s > LONG_CALL * self.team.maximum(self.budget.share())[0]:
                    self.budget.spend(len(left))
                    break
            previous_bytes, previous_s = bytes_, fastest_s
        return medians[0]


def _nearest(families: Sequence[GroupFamily]) -> list[GroupFamily]:
    """The first family of each size: near tiers come first."""
    by_size: dict[int, GroupFamily] = {}
    for family in families:
        by_size.setdefault(family.size, family)
    return list(by_size.values())
