"""Dispatch and combine of a layer by any all-to-all algorithm: flat's own curves, scaled by the all-to-all model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from piper_hpc.resource_model.all_to_all import AllToAllRouting, all_to_all
from piper_hpc.resource_model.eager import rows
from piper_hpc.resource_model.eager.all_to_all import (
    LEAST_ROWS,
    AllToAllModel,
    Selection,
    fit_all_to_all_model,
    of_links,
    select_by_model,
    select_measured,
)
from piper_hpc.resource_model.eager.compute import MicroBatch, ModuleCost
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.groups import Group
from piper_hpc.resource_model.eager.load import busiest_load, wire_load
from piper_hpc.resource_model.eager.pipeline import held_chunks
from piper_hpc.resource_model.eager.pool import pool_bytes
from piper_hpc.resource_model.extrapolation import growth, nodes_beyond
from piper_hpc.resource_model.topology import NODE, SYSTEM, Links
from piper_hpc.spec import (
    ALGORITHMS,
    ALL_TO_ALLS_PER_STEP,
    AUTO,
    CHUNKS,
    DISPATCH_COMBINE,
    FLAT,
    LEVELS,
    TIERS,
    AllToAllCell,
    AllToAllConfig,
    Layout,
    Link,
    ModelSpec,
    Tier,
    Topology,
    Workload,
    get_algorithm,
)

SWITCH, RACK = TIERS.index(Tier.SWITCH.value), TIERS.index(Tier.RACK.value)


@dataclass(frozen=True)
class DispatchCombine:
    """Costs of dispatch and combine of one layer in one micro-batch, and the algorithm that was selected for them.

    wire: of a dispatch, forward and backward, what its rows are on their way, beside which others may compute.
    """

    dispatch: ModuleCost
    combine: ModuleCost
    selection: Selection
    wire: rows.Wire


class DispatchCosts(Protocol):
    """What `facts` reads of a step.StepCost: by stage the expert group, with its dispatch and combine."""

    @property
    def all_to_alls(self) -> tuple[tuple[Group, DispatchCombine], ...]: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def curves(self) -> Curves: ...


def cell_of(
    group: Group, topology: Topology | None, model: ModelSpec, tokens: int, bytes_per_value: int, load: float
) -> AllToAllCell:
    """The cell of a dispatch of `tokens` tokens a rank in `group`; load: of the busiest rank over the mean."""
    row_bytes = float(model.hidden * bytes_per_value)
    return AllToAllCell(
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


def all_to_all_model(curves: Curves) -> AllToAllModel:
    """Fitted to the calibration's measured all-to-alls where it has enough of them, else made of the links."""
    measured = curves.calibration.exchanges
    return fit_all_to_all_model(measured) if len(measured) >= LEAST_ROWS else of_links(curves)


def select(curves: Curves, cell: AllToAllCell, algorithm: str, among: Iterable[str] = ALGORITHMS) -> Selection:
    """`algorithm` itself, or for `auto` the one of `among` that was measured, or else is predicted, as the fastest."""
    if algorithm != AUTO:
        return Selection(AllToAllConfig(algorithm), why="as configured")
    enough = len(curves.calibration.exchanges) >= LEAST_ROWS

    def expected(config: AllToAllConfig, where: AllToAllCell) -> float:
        return all_to_all_model(curves).seconds(config.algorithm, where, config.chunks)

    measured = select_measured(curves.calibration.exchanges, cell, among, expected if enough else None)
    return measured or select_by_model(all_to_all_model(curves), cell, among)


def dispatch_combine(batch: MicroBatch, group: Group, algorithm: str) -> DispatchCombine:
    """Dispatch and combine under `algorithm`, or under what `auto` chooses for this group, size, top_k and load.

    Flat is priced by its own curves, and so is a padded one, with what padding adds to the load. Another algorithm's
    seconds are flat's times the ratio that the all-to-all model predicts: one for dispatch in forward, which plans, one
    for combine and all backward, which use the plan; the errors of both are taken as independent in the interval. What
    CPU ranks stand still of it has a ratio of its own: an algorithm that sends less may compute more. The model holds
    for groups of any shape; on larger ones than were measured, on more nodes, it is less sure of itself.
    """
    padded = algorithm != AUTO and get_algorithm(algorithm).padded
    load = batch.load if padded else wire_load(batch.load, group, batch.curves.cluster)
    flat = rows.dispatch(batch, group, load), rows.combine(batch, group, load)
    wire = rows.rows_wire(batch, group, load)
    if algorithm == FLAT.name or group.size == 1:
        why = "as configured" if algorithm == FLAT.name else "a group of one"
        return DispatchCombine(*flat, Selection(AllToAllConfig(FLAT.name), why=why), wire)
    if padded:
        return DispatchCombine(*flat, Selection(AllToAllConfig(algorithm), why="as configured"), wire)
    curves = batch.curves
    cell = cell_of(group, curves.cluster.topology, batch.model, batch.tokens, batch.bytes_per_value, batch.load)
    selection = select(curves, cell, algorithm)
    config = selection.config
    if algorithm == AUTO:
        chunks = f" in {config.chunks} chunks" if config.chunks else ""
        curves.note(
            f"all_to_all={algorithm}: {config.algorithm}{chunks} for {cell.ranks} ranks on {cell.nodes} nodes, "
            f"{selection.why}"
        )
    for note in selection.notes:
        curves.note(note)
    if config.algorithm == FLAT.name:
        return DispatchCombine(*flat, selection, wire)
    model = all_to_all_model(curves)
    if not model.measured:
        curves.note(
            f"all_to_all={config.algorithm}: not measured on this cluster; flat's times are scaled by a cost model "
            "of its links"
        )
    with_plan, without = (
        [
            model.seconds(each.algorithm, cell, each.chunks, with_plan=planning)
            for each in (config, AllToAllConfig(FLAT.name))
        ]
        for planning in (True, False)
    )
    # The seconds without planning are half dispatch and half combine; those of planning are all dispatch.
    spread = model.spread
    if model.measured and nodes_beyond(curves.cluster) > 1:
        largest = max(row.ranks for row in curves.calibration.exchanges)
        spread = (1 + spread) * growth(cell.ranks / largest) - 1
    first, other = (with_plan[0] - without[0] / 2) / (with_plan[1] - without[1] / 2), without[0] / without[1]

    def scaled(cost: ModuleCost, forward: float) -> ModuleCost:  # neither has weights
        return ModuleCost(_scaled(cost.forward, forward, spread), _scaled(cost.backward, other, spread))

    idle_s = wire.idle_s * _idle_ratio(curves, cell, config, otherwise=other)
    scaled_wire = rows.Wire(_scaled(wire.cost, other, spread), min(idle_s, wire.cost.seconds * other))
    return DispatchCombine(scaled(flat[0], first), scaled(flat[1], other), selection, scaled_wire)


def _idle_ratio(curves: Curves, cell: AllToAllCell, config: AllToAllConfig, otherwise: float) -> float:
    """What a rank stands still in an exchange under `config` over what it does under flat, in the nearest measured
    cells; `otherwise` where nobody measured it."""
    idle = [replace(row, seconds=row.idle_s) for row in curves.calibration.exchanges if row.idle_s > 0]
    near = select_measured(idle, cell, (FLAT.name, config.algorithm))
    seconds = near.seconds if near else {}
    of_config = seconds.get(str(replace(config, chunks=config.chunks or CHUNKS)), seconds.get(str(config)))
    return of_config / seconds[FLAT.name] if of_config and FLAT.name in seconds else otherwise


def _scaled(cost: Cost, ratio: float, spread: float) -> Cost:
    return cost * ratio + Cost(0.0, {DISPATCH_COMBINE: cost.seconds * ratio * spread})


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
    level: node, rack (other node) and system (other rack), without padding. shares: of each expert, where routing is
    known."""
    found = all_to_all(
        FLAT.name if get_algorithm(algorithm).padded else algorithm,
        group,
        Links((Link(0.0, 1.0),) * len(TIERS)),
        tokens * model.top_k,
        model.hidden * bytes_per_value,
        AllToAllRouting(model.experts, model.top_k, shares=tuple(shares)),
    )
    sent = [float(each) * ALL_TO_ALLS_PER_STEP for each in found.payload_bytes]
    bounds = (0, NODE + 1, _rack_tier(topology) + 1, len(sent))
    return {level: sum(sent[low:high]) for level, (low, high) in zip(LEVELS, pairwise(bounds), strict=True)}


def pools(cost: DispatchCosts, model: ModelSpec, layout: Layout, workload: Workload) -> list[int]:
    """Bytes of the buffers that the all-to-all of each pipeline rank keeps."""
    if not any(map(_is_scaled, cost.all_to_alls)):
        return [0] * layout.pp
    tokens, load = layout.micro_batch * workload.sequence, busiest_load(model, layout, workload)
    topology, value = cost.curves.cluster.topology, workload.bytes_per_value
    return [
        pool_bytes(cell_of(group, topology, model, tokens, value, load), exchange.selection.config.algorithm)
        for group, exchange in cost.all_to_alls
    ]


def _is_scaled(stage: tuple[Group, DispatchCombine]) -> bool:
    """Whether the all-to-all of a stage is priced in proportion to flat's."""
    algorithm = stage[1].selection.config.algorithm
    return algorithm != FLAT.name and not get_algorithm(algorithm).padded


def facts(cost: DispatchCosts, model: ModelSpec, layout: Layout, workload: Workload) -> dict[str, Any]:
    """`Prediction.exchange` of a costed step."""
    tokens, topology = layout.micro_batch * workload.sequence, cost.curves.cluster.topology
    load = busiest_load(model, layout, workload)
    payload = dict.fromkeys(LEVELS, 0.0)
    stages = []
    # A recomputed layer dispatches and combines once more: two all-to-alls beside the four of a step.
    exchanges = cost.micro_batches * (1 + layout.recomputed.full / 2)
    for (group, layer), held in zip(cost.all_to_alls, held_chunks(layout, model), strict=True):
        layers = sum(chunk.moe_layers for chunk in held)
        cell = cell_of(group, topology, model, tokens, workload.bytes_per_value, load)
        stages.append({"ranks": cell.ranks, "nodes": cell.nodes, "racks": cell.racks} | layer.selection.document())
        sent = step_bytes(
            layer.selection.config.algorithm,
            group,
            topology,
            model,
            tokens,
            workload.bytes_per_value,
            workload.routing.histogram,
        )
        padding = load if get_algorithm(layer.selection.config.algorithm).padded else 1.0
        for level in LEVELS:
            payload[level] += padding * sent[level] * layers * exchanges * layout.ranks / layout.pp
    scaled = any(map(_is_scaled, cost.all_to_alls))
    model_used = {"model": all_to_all_model(cost.curves).document()} if scaled else {}
    return {"stages": stages, "payload_bytes": payload} | model_used
