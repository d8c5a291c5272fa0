"""Dispatch and combine of one micro-batch by the flat algorithm: rows permuted on their rank, and sent over the wire.

What a rank does by itself is measured whole, for an expert group of one; half of it is taken to be the backward's.
Where rows come from several ranks they are sorted once more, which is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.compute import HOST_OPERATIONS, MicroBatch, ModuleCost
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.groups import Group

INDEX_BYTES = 8
"""torch's indices and counts are int64."""


@dataclass(frozen=True)
class Wire:
    """One all-to-all: its seconds, and of them those in which a rank computes nothing."""

    cost: Cost
    idle_s: float

    @property
    def computed_s(self) -> float:
        """Seconds in which a rank sends or receives."""
        return self.cost.seconds - self.idle_s


def rows_wire(batch: MicroBatch, group: Group, load: float) -> Wire:
    """The all-to-all of every row; nothing for a group of one.

    It lasts as long as a balanced one in which every link carries `load` times as much: what the busiest one does.
    """
    return _wire(batch, group, load * communication.all_to_all_bytes(batch.tokens, batch.model, batch.bytes_per_value))


def counts_wire(batch: MicroBatch, group: Group) -> Wire:
    """The all-to-all of how many rows each rank sends to each expert; nothing for a group of one."""
    return _wire(batch, group, batch.model.experts * INDEX_BYTES)


def _wire(batch: MicroBatch, group: Group, send_bytes: float) -> Wire:
    if group.size == 1:
        return Wire(Cost(), 0.0)
    cost = communication.all_to_all(batch.curves, group, send_bytes)
    return Wire(cost, communication.all_to_all_idle(batch.curves, group, send_bytes))


def dispatch(batch: MicroBatch, group: Group, load: float = 1.0) -> ModuleCost:
    """Rows gathered in expert order, an all-to-all of their counts, then one of the rows; on arrival sorted again."""
    permuted = _permuted(batch, "dispatch_rows")
    if group.size == 1:
        return permuted
    counts, rows = counts_wire(batch, group).cost, rows_wire(batch, group, load).cost + batch.gather()
    return (
        permuted + batch.host(HOST_OPERATIONS["dispatch_all_to_all"]) + ModuleCost(batch.sort() + counts + rows, rows)
    )


def combine(batch: MicroBatch, group: Group, load: float = 1.0) -> ModuleCost:
    """[rows, hidden] returned to their tokens' ranks, put in token order, weighted, summed by token, plus residual."""
    permuted = _permuted(batch, "combine_rows") + ModuleCost(batch.stream((3 * batch.hidden, 1)), Cost())
    if group.size == 1:
        return permuted
    rows = rows_wire(batch, group, load).cost + batch.gather()
    return permuted + ModuleCost(rows, rows)


def _permuted(batch: MicroBatch, operator: str) -> ModuleCost:
    half = batch.curves.operation(operator, batch.rows * batch.model.hidden * batch.bytes_per_value) * 0.5
    return ModuleCost(half, half)
