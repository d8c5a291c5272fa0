"""Dispatch and combine of a layer by any algorithm of the family: those of flat, times what the exchange model says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from piper_hpc.resource_model.all_to_all import Routing, all_to_all
from piper_hpc.resource_model.eager import compute
from piper_hpc.resource_model.eager.compute import MicroBatch, ModuleCost
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.exchange import (
    LEAST_ROWS,
    Choice,
    ExchangeModel,
    Way,
    cheapest,
    choose,
    fit_exchange_model,
    of_links,
)
from piper_hpc.resource_model.eager.groups import Group
from piper_hpc.resource_model.topology import NODE, SYSTEM, Links
from piper_hpc.spec import (
    ALGORITHMS,
    AUTO,
    DISPATCH_COMBINE,
    LEVELS,
    MOVES_PER_STEP,
    TIERS,
    ExchangeCell,
    Layout,
    Link,
    ModelSpec,
    Tier,
    Topology,
    Workload,
)

SWITCH, RACK = TIERS.index(Tier.SWITCH.value), TIERS.index(Tier.RACK.value)


@dataclass(frozen=True)
class Exchanged:
    """Dispatch and combine of one layer in one micro-batch, and how they were chosen."""

    dispatch: ModuleCost
    combine: ModuleCost
    choice: Choice


class Costed(Protocol):
    """Of a step's costs (see step.StepCost): the expert group and its exchange by stage."""

    @property
    def exchanges(self) -> tuple[tuple[Group, Exchanged], ...]: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def curves(self) -> Curves: ...


def cell_of(
    group: Group, topology: Topology | None, model: ModelSpec, tokens: int, bytes_per_value: int, load: float
) -> ExchangeCell:
    """What `tokens` of one rank ask of the exchange model; load: of the busiest rank over the mean."""
    row_bytes = float(model.hidden * bytes_per_value)
    return ExchangeCell(
        ranks=int(group.size),
        nodes=max(1, round(group.size / group.within(NODE))),
        racks=max(1, round(group.size / group.within(_rack_tier(topology)))),
        logical_bytes=tokens * model.top_k * row_bytes,
        row_bytes=row_bytes,
        top_k=model.top_k,
        experts=model.experts,
        imbalance=max(1.0, load),
    )


def _rack_tier(topology: Topology | None) -> int:
    """Number of the widest tier inside what a run calls rack: the innermost domain beyond the node that is known, or
    everything where none is. Without a topology nodes and their racks are known one by one."""
    if topology is None or (topology.rack and not topology.switch):
        return RACK
    return SWITCH if topology.switch else SYSTEM


def exchange_model(curves: Curves) -> ExchangeModel:
    """Fitted to the calibration's measured exchanges where it has enough of them, else made of the links."""
    measured = curves.calibration.exchanges
    return fit_exchange_model(measured) if len(measured) >= LEAST_ROWS else of_links(curves)


def settle(curves: Curves, cell: ExchangeCell, algorithm: str, among: Sequence[str] = ALGORITHMS) -> Choice:
    """The choice that `algorithm` leaves: itself, or for `auto` what was measured or the cost model finds fastest."""
    if algorithm != AUTO:
        return Choice(algorithm, why="as configured")
    enough = len(curves.calibration.exchanges) >= LEAST_ROWS

    def expected(way: Way, where: ExchangeCell) -> float:
        return exchange_model(curves).seconds(way[0], where, way[1])

    measured = choose(curves.calibration.exchanges, cell, among, expected if enough else None)
    return measured or cheapest(exchange_model(curves), cell, among)


def exchanged(batch: MicroBatch, group: Group, algorithm: str) -> Exchanged:
    """Dispatch and combine under `algorithm`, or under what `auto` chooses for this group, size, top_k and load.

    Flat is priced by its own curves. Another algorithm takes as many times longer or less as the exchange model finds,
    for dispatch in forward, which plans, and for all others, which carry the plan out; that both errors are of one
    model is given no credit in the interval.
    """
    flat = compute.dispatch(batch, group), compute.combine(batch, group)
    if algorithm == "flat" or group.size == 1:
        return Exchanged(*flat, Choice("flat", why="as configured" if algorithm == "flat" else "a group of one"))
    curves = batch.curves
    cell = cell_of(group, curves.cluster.topology, batch.model, batch.tokens, batch.bytes_per_value, batch.load)
    choice = settle(curves, cell, algorithm)
    told = f"all_to_all={algorithm}"
    if algorithm == AUTO:
        chunks = f" in {choice.chunks} chunks" if choice.chunks else ""
        told += f": {choice.algorithm}{chunks} for {cell.ranks} ranks on {cell.nodes} nodes, {choice.why}"
        curves.note(told)
    for note in choice.notes:
        curves.note(note)
    if choice.algorithm == "flat":
        return Exchanged(*flat, choice)
    model = exchange_model(curves)
    if not model.measured:
        curves.note(
            f"all_to_all={choice.algorithm}: not measured on this cluster; flat's times are scaled by a cost model "
            "of its links"
        )
    planned, carried = (
        [
            model.seconds(name, cell, chunks, planned=with_plan)
            for name, chunks in ((choice.algorithm, choice.chunks), ("flat", 0))
        ]
        for with_plan in (True, False)
    )
    # Half of what carries a plan out is the dispatch, and all of what makes it.
    first, other = (planned[0] - carried[0] / 2) / (planned[1] - carried[1] / 2), carried[0] / carried[1]

    def scaled(cost: ModuleCost, forward: float) -> ModuleCost:
        return ModuleCost(_scaled(cost.forward, forward, model), _scaled(cost.backward, other, model))

    return Exchanged(scaled(flat[0], first), scaled(flat[1], other), choice)


def _scaled(cost: Cost, ratio: float, model: ExchangeModel) -> Cost:
    seconds = cost.seconds * ratio
    return cost * ratio + Cost(0.0, {DISPATCH_COMBINE: seconds * model.spread})


def step_bytes(
    algorithm: str,
    group: Group,
    topology: Topology | None,
    model: ModelSpec,
    tokens: int,
    bytes_per_value: int,
    shares: Sequence[float] = (),
) -> dict[str, float]:
    """Payload bytes that the mean rank sends in one step for one layer and one micro-batch of `tokens` tokens, by
    level: node, rack (other node) and system (other rack). shares: of each expert, where routing is known."""
    found = all_to_all(
        algorithm,
        group,
        Links((Link(0.0, 1.0),) * len(TIERS)),
        tokens * model.top_k,
        model.hidden * bytes_per_value,
        Routing(model.experts, model.top_k, shares=tuple(shares)),
    )
    sent = [float(each) * MOVES_PER_STEP for each in found.payload_bytes]
    bounds = (0, NODE + 1, _rack_tier(topology) + 1, len(sent))
    return {level: sum(sent[low:high]) for level, (low, high) in zip(LEVELS, pairwise(bounds), strict=True)}


def facts(cost: Costed, model: ModelSpec, layout: Layout, workload: Workload) -> dict[str, Any]:
    """`Prediction.exchange` of a costed step."""
    tokens, topology = layout.micro_batch * workload.sequence, cost.curves.cluster.topology
    load = float(workload.routing.load(layout.ep))
    payload = dict.fromkeys(LEVELS, 0.0)
    stages = []
    for (group, moved), layers in zip(cost.exchanges, layout.stage_layers(model.layers), strict=True):
        cell = cell_of(group, topology, model, tokens, workload.bytes_per_value, load)
        stages.append({"ranks": cell.ranks, "nodes": cell.nodes, "racks": cell.racks} | moved.choice.document())
        sent = step_bytes(
            moved.choice.algorithm,
            group,
            topology,
            model,
            tokens,
            workload.bytes_per_value,
            workload.routing.histogram,
        )
        for level in LEVELS:
            payload[level] += sent[level] * len(layers) * cost.micro_batches * layout.ranks / layout.pp
    scaled = any(moved.choice.algorithm != "flat" for _, moved in cost.exchanges)
    model_used = {"model": exchange_model(cost.curves).document()} if scaled else {}
    return {"stages": stages, "payload_bytes": payload} | model_used
