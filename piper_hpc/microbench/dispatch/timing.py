"""Timing of dispatch and combine: all algorithms of a cell in turn within each iteration, every result checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch

from piper_hpc.comm import FlatDispatcher, HaloDispatcher
from piper_hpc.comm.channel import Channel
from piper_hpc.comm.family import Family
from piper_hpc.comm.plan import Handle
from piper_hpc.microbench.dispatch.cells import Cell, Measured, Variant, row
from piper_hpc.microbench.dispatch.workloads import draw, entered, source_tokens
from piper_hpc.microbench.timing import REST_S, Budget, Team
from piper_hpc.spec import LEVELS, Placement

LEAST = 4
"""Iterations that a cell gets whatever its share of the time."""
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}
"""Of the result against flat's, relative to its norm: sums are taken in another order."""

OnRow = Callable[[dict[str, Any]], None]
LinkBytes = Callable[[], int]
"""Bytes that have left this rank's node so far."""


@dataclass(frozen=True)
class Counted:
    """What this rank sends in one dispatch: payload by rank, [ranks], and metadata by level."""

    payload_to: list[int]
    metadata: dict[str, int]


class Contender:
    """One variant, ready to run."""

    def __init__(self, variant: Variant, family: Family, others: Mapping[str, Channel]) -> None:
        self.variant = variant
        self.dispatcher: FlatDispatcher | HaloDispatcher
        if variant.algorithm in others:
            self.dispatcher = FlatDispatcher.over(others[variant.algorithm], family.places.ranks)
        else:
            self.dispatcher = family.dispatcher(variant.algorithm, chunks=max(1, variant.chunks))

    def run(self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: Placement) -> torch.Tensor:
        """What is timed: from tokens to combined tokens, with experts that do nothing."""
        rows, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        return self.dispatcher.combine(rows, handle)  # type: ignore[arg-type]

    def check(
        self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, placement: Placement, rank: int
    ) -> tuple[torch.Tensor, Counted]:
        """The same with experts that scale by their id, so that a row at a wrong expert shows; and what it sent."""
        rows, handle = self.dispatcher.dispatch(tokens, ids, weights, placement)
        sizes = torch.diff(handle.offsets, prepend=handle.offsets.new_zeros(1)).long()
        scale = torch.tensor([1 + expert / 64 for expert in placement.experts_of(rank)], device=rows.device)
        scaled = rows * scale.repeat_interleave(sizes)[:, None].to(rows.dtype)
        row_bytes = tokens.shape[1] * tokens.element_size()
        if isinstance(handle, Handle):
            counted = Counted([count * row_bytes for count in handle.plan.send_rows], dict.fromkeys(LEVELS, 0))
        else:
            assert isinstance(self.dispatcher, HaloDispatcher)
            sent = self.dispatcher.volume(handle.plan, row_bytes=row_bytes, weight_bytes=weights.element_size())
            counted = Counted(
                [count * row_bytes for count in self.dispatcher.rows_to(handle.plan)],
                {level: sent[level].metadata_bytes for level in LEVELS},
            )
        return self.dispatcher.combine(scaled, handle), counted  # type: ignore[arg-type]


def time_cells(
    cells: Sequence[Cell],
    variants: Sequence[Variant],
    *,
    family: Family,
    device: torch.device,
    iterations: int,
    budget_s: float,
    on_row: OnRow,
    others: Mapping[str, Channel] | None = None,
    link_bytes: LinkBytes | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Measure every variant in every cell; collective over the ranks of the default group, which are the family's.

    iterations: of each variant in a cell, fewer where the cell's share of `budget_s` seconds ends before; on_row:
    called on rank 0 with the rows of each cell as it is done; others: algorithms that go flat over another channel;
    extra: what every row has beside. A sample is the slowest rank's time of one call that all began together.
    Raises ValueError where the experts do not divide over the ranks.
    """
    team, budget = Team(device), Budget(budget_s, len(cells))
    contenders = [Contender(variant, family, others or {}) for variant in variants]
    reference = next((each for each in contenders if each.variant.algorithm == "flat"), None)
    reference = reference or Contender(Variant("flat"), family, {})
    for cell in cells:
        bench = _Bench(cell, contenders, reference, family, team, link_bytes)
        for found in bench.rows(iterations, budget.share(), extra or {}):
            if team.rank == 0:
                on_row(found)
        budget.spend()


class _Bench:
    """One cell."""

    def __init__(
        self,
        cell: Cell,
        contenders: Sequence[Contender],
        reference: Contender,
        family: Family,
        team: Team,
        link_bytes: LinkBytes | None,
    ) -> None:
        self.cell, self.contenders, self.reference, self.team = cell, contenders, reference, team
        self.places, self.link_bytes = family.places, link_bytes
        self.placement = Placement.linear(cell.experts, team.world)
        held = source_tokens(cell.workload, ranks=team.world, tokens=cell.tokens)[team.rank]
        generator = torch.Generator().manual_seed(team.rank)
        values = torch.randn(held, cell.hidden, generator=generator)
        self.tokens = values.to(device=team.device, dtype=getattr(torch, cell.dtype))

    def routing(self, iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = draw(
            self.cell.workload, experts=self.cell.experts, top_k=self.cell.top_k, ranks=self.team.world,
            tokens=self.cell.tokens, rank=self.team.rank, step=self.cell.step(iteration),
        )  # fmt: skip
        device = self.team.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(weights).to(device=device, dtype=self.tokens.dtype)

    @torch.no_grad()
    def rows(self, iterations: int, share_s: float, extra: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
        checked = self.check()
        started = perf_counter()
        self.round(0, range(len(self.contenders)))
        round_s, share_s = self.team.maximum(perf_counter() - started, share_s)
        # The check and the round before have had their part of the share.
        count = max(LEAST, min(iterations, int(share_s / round_s) - 2) // 2 * 2)
        samples = np.empty((count, len(self.contenders)))
        for iteration in range(count):
            # Another order each time, the same on all ranks: no variant always follows the same one.
            order = np.random.default_rng(iteration).permutation(len(self.contenders))
            samples[iteration] = self.round(iteration, order)
        slowest = self.team.table(samples.reshape(-1).tolist()).max(axis=0).reshape(samples.shape)
        group = {
            "ranks": self.team.world,
            "nodes": len(set(zip(self.places.rack_of_rank, self.places.node_of_rank, strict=True))),
            "racks": len(set(self.places.rack_of_rank)),
        }
        for index, contender in enumerate(self.contenders):
            measured, between = checked[index]
            yield row(
                self.cell,
                contender.variant,
                group,
                Measured(slowest[:, index].tolist(), *measured),
                bytes_between_nodes=between,
                formula_bytes=self.formula_bytes(contender.variant, group["nodes"]),
                **extra,
            )

    def round(self, iteration: int, order: Iterable[int]) -> np.ndarray:
        """Seconds of one call of each contender."""
        ids, weights = self.routing(iteration)
        seconds = np.zeros(len(self.contenders))
        for index in order:
            contender = self.contenders[index]
            # A CPU rank's quota is whole again after a rest: no variant pays for the one before it.
            sleep(REST_S if self.team.device.type == "cpu" else 0.0)
            self.team.barrier()
            started = perf_counter()
            contender.run(self.tokens, ids, weights, self.placement)
            self.team.wait_for_device()
            seconds[index] = perf_counter() - started
        return seconds

    def check(self) -> list[tuple[tuple[dict[str, float], dict[str, float], list[float], bool], list[list[float]]]]:
        """By contender: payload and metadata by level, bytes by eth0 of each node, whether right; and payload from node
        to node. All of one dispatch but those by eth0, which are of dispatch and combine."""
        ids, weights = self.routing(0)
        rank, nodes = self.team.rank, self.nodes()
        expected, _ = self.reference.check(self.tokens, ids, weights, self.placement, rank)
        found = []
        for contender in self.contenders:
            self.team.barrier()
            before = self.link_bytes() if self.link_bytes else 0
            result, counted = contender.check(self.tokens, ids, weights, self.placement, rank)
            self.team.barrier()
            link = self.link_bytes() - before if self.link_bytes else 0
            wide = expected.double()
            error = float((result.double() - wide).norm())
            wrong = not error <= TOLERANCE[self.cell.dtype] * float(wide.norm())  # also where it is not a number
            to_node, levels = np.zeros(len(nodes)), dict.fromkeys(LEVELS, 0.0)
            for peer, payload in enumerate(counted.payload_to):
                to_node[nodes.index(self.node(peer))] += payload
                if peer != rank:
                    levels[self.places.tier(rank, peer)] += payload
            table = self.team.table([link, wrong, *to_node, *levels.values(), *counted.metadata.values()])
            of_ranks = table[:, 2 : 2 + len(nodes)]
            between = [of_ranks[[self.node(r) == node for r in range(self.team.world)]].sum(0) for node in nodes]
            total = dict(zip(LEVELS, table[:, -6:-3].sum(0).tolist(), strict=True))
            metadata = dict(zip(LEVELS, table[:, -3:].sum(0).tolist(), strict=True))
            first = [next(r for r in range(self.team.world) if self.node(r) == node) for node in nodes]
            links = table[first, 0].tolist() if self.link_bytes else []
            found.append(((total, metadata, links, not table[:, 1].any()), [line.tolist() for line in between]))
        return found

    def node(self, rank: int) -> tuple[int, int]:
        return self.places.rack_of_rank[rank], self.places.node_of_rank[rank]

    def nodes(self) -> list[tuple[int, int]]:
        return list(dict.fromkeys(self.node(rank) for rank in range(self.team.world)))

    def formula_bytes(self, variant: Variant, nodes: int) -> float | None:
        """Payload of a mean rank between nodes, in closed form, of halo_dedup; None for others and for uneven nodes."""
        per_node, uneven = divmod(self.team.world, nodes)
        if variant.algorithm != "halo_dedup" or uneven:
            return None
        cell = self.cell
        inside = entered(
            cell.workload, experts=cell.experts, top_k=cell.top_k, domains=nodes, step=cell.step(0)
        )  # fmt: skip
        held = source_tokens(cell.workload, ranks=self.team.world, tokens=cell.tokens)
        rows = sum(tokens * (sum(inside) - inside[rank // per_node]) for rank, tokens in enumerate(held))
        return rows * cell.row_bytes / self.team.world
