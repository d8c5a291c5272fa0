"""The exchange suites: every size up to the time box, over groups of every size and locality, by one back end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from piper_hpc.microbench.box import TimeBox
from piper_hpc.microbench.exchanges import BUS_FACTOR, Exchange, no_exchange
from piper_hpc.microbench.groups import GroupFamily, group_families, pairs, pipeline_families
from piper_hpc.microbench.links import LinkCounter, counter_mismatch, minimum_bytes
from piper_hpc.microbench.rows import Row, RowWriter, percentiles
from piper_hpc.microbench.shapes import KIB
from piper_hpc.microbench.timing import Timing, time_exchange

SUITES = ("p2p", "all_reduce", "reduce_scatter", "all_gather", "all_to_all")

MESSAGES: dict[str, tuple[int, ...]] = {
    "cpu": tuple(KIB * 4**power for power in range(7)),
    "gpu": tuple(KIB * 4**power for power in range(10)),
}
"""Bytes of the exchange suites: 1 KiB to 4 MiB on a CPU, to 256 MiB on an accelerator."""


def sizes_of(device: torch.device) -> Sequence[int]:
    """Bytes of the messages that are timed between such devices, in order."""
    return MESSAGES["cpu" if device.type == "cpu" else "gpu"]


class Backend(Protocol):
    """What carries exchanges out; see TorchBackend and MpiBackend."""

    @property
    def name(self) -> str:
        """For rows: `torch` or `mpi`."""

    @property
    def library(self) -> str:
        """For rows: gloo, nccl, or the MPI library and its version."""

    def round_trip(self, pair: tuple[int, int], elements: int) -> Exchange:
        """A message from the first rank of a pair to the second and back."""

    def collectives(self, family: GroupFamily) -> AbstractContextManager[Callable[[str, int], Exchange]]:
        """A builder of the family's exchanges by name and elements."""


@dataclass
class ExchangeSuite:
    """One pass over the exchanges that were asked for; every rank makes it, rank 0's caller is given the rows.

    cell_s: seconds a cell may take; done: cell -> row of what need not be measured again; counter: of this node's link,
    against which rows are held. `left_out`: cell -> why, afterwards.
    """

    row_writer: RowWriter
    backend: Backend
    device: torch.device
    cell_s: float
    done: Mapping[str, Row] = field(default_factory=dict)
    counter: LinkCounter | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, suites: Sequence[str]) -> None:
        """Measure the exchanges of these suites, in the order p2p first, then by group."""
        if "p2p" in suites:
            for tier, pair in pairs(self.row_writer.ranks).items():
                self._p2p("p2p", f"p2p/{tier}", GroupFamily(2, tier, (pair,)))
            for stage_ranks, family in pipeline_families(self.row_writer.ranks).items():
                self._p2p("p2p_concurrent", f"p2p_concurrent/{family.tier}/{stage_ranks}", family)
        names = [name for name in SUITES if name in suites and name != "p2p"]
        for family in group_families(self.row_writer.ranks):
            operators = {name: f"{name}/{family.tier}/{family.size}" for name in names}
            if all(self._cell(operator, size) in self.done for operator in operators.values() for size in self._sizes):
                continue
            with self.backend.collectives(family) as build:
                for name, operator in operators.items():
                    self._curve(name, operator, family, partial(build, name))

    @property
    def _sizes(self) -> Sequence[int]:
        return sizes_of(self.device)

    def _cell(self, operator: str, size: int) -> str:
        return f"{self.backend.name}/{operator}/{size}"

    def _p2p(self, name: str, operator: str, family: GroupFamily) -> None:
        mine = next((group for group in family.groups if self.row_writer.team.rank in group), None)

        def build(elements: int) -> Exchange:
            return no_exchange() if mine is None else self.backend.round_trip((mine[0], mine[1]), elements)

        self._curve(name, operator, family, build, calls_per_message=0.5)

    def _curve(
        self,
        name: str,
        operator: str,
        family: GroupFamily,
        build: Callable[[int], Exchange],
        calls_per_message: float = 1.0,
    ) -> None:
        box = TimeBox(self.cell_s)
        for size, elements in self._elements(family):
            cell, bytes_ = self._cell(operator, size), float(elements * self._item)
            if cell in self.done:
                box.add(bytes_, self.done[cell]["min_s"] / calls_per_message)
                continue
            if not box.fits(bytes_):
                self.left_out[cell] = box.reason(bytes_)
                continue
            call, wrong = build(elements)
            timing, refused = self._timed(name, family, bytes_, call)
            verdict: Row = {"correct": False, "refused": refused} if refused else {}
            of_group = np.stack([timing.samples[list(group)].mean(axis=0) for group in family.groups])
            box.add(bytes_, float(of_group.min()))
            timing = Timing(of_group * calls_per_message, timing.iterations)
            median_s = float(timing.statistics()["median_s"])
            self.row_writer.write(
                operator,
                bytes_,
                "bytes",
                {"elements": elements},
                timing,
                wrong,
                family.ranks,
                **percentiles(timing),
                **verdict,
                cell=cell,
                backend=self.backend.name,
                library=self.backend.library,
                group_size=family.size,
                tier=family.tier,
                concurrent_groups=len(family.groups),
                algbw_bytes_per_s=bytes_ / median_s,
                busbw_bytes_per_s=bytes_ / median_s * BUS_FACTOR[name](family.size),
            )

    @property
    def _item(self) -> int:
        return torch.empty((), dtype=self.row_writer.dtype).element_size()

    def _elements(self, family: GroupFamily) -> Iterator[tuple[int, int]]:
        """Each size in bytes with the elements nearest above that every rank of a group gets an equal part of."""
        for size in self._sizes:
            yield size, -(-size // (self._item * family.size)) * family.size

    def _timed(
        self, name: str, family: GroupFamily, bytes_: float, call: Callable[[], object]
    ) -> tuple[Timing, str | None]:
        """The timing, and why the links' counters speak against it, the same on every rank."""
        calls = 0

        def counted() -> None:
            nonlocal calls
            calls += 1
            call()

        team, places = self.row_writer.team, self.row_writer.ranks
        before = self._sent()
        timing = time_exchange(counted, team, self.cell_s)
        least = calls * minimum_bytes(name, family, bytes_, places)
        if self.counter is None or not least:
            return timing, None
        sent = team.table([self._sent() - before])[:, 0]
        # One rank of each node speaks for its link; all ranks called equally often.
        first_of_node = {node: rank for rank, node in reversed(list(enumerate(places.node_of_rank)))}
        return timing, counter_mismatch(
            name, self.counter.interface, float(sent[list(first_of_node.values())].sum()), least
        )

    def _sent(self) -> float:
        self.row_writer.team.barrier()
        return float(self.counter.sent_bytes()) if self.counter is not None else 0.0
