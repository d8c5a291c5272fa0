"""`all_to_all=auto`: which algorithm a group takes, by what the cluster measured, or by its links where it did not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from piper_hpc.resource_model.eager.all_to_all.model import AllToAllModel
from piper_hpc.spec import ALGORITHMS, AllToAllCell, AllToAllConfig, MeasuredAllToAll

Point = tuple[float, int, float]
"""Where a measured cell lies: logical bytes, top_k, imbalance."""

Shape = tuple[int, int, int]
"""Ranks, nodes and racks of a group."""

Expected = Callable[[AllToAllConfig, AllToAllCell], float]
"""Seconds by a cost model, whose error changes less from cell to cell than the seconds do."""


@dataclass(frozen=True)
class Selection:
    """What `auto` selects, or what was configured. seconds: expected of a dispatch and combine by each candidate, named
    `algorithm` or `algorithm/chunks`; why: one sentence for people; rests_on: the cells or the model it was selected
    by; notes: what a reader must know, such as another group that stood in."""

    config: AllToAllConfig
    seconds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    rests_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "algorithm": self.config.algorithm,
            "chunks": self.config.chunks or None,
            "why": self.why,
            "seconds": dict(self.seconds),
            "rests_on": list(self.rests_on),
            "notes": list(self.notes),
        }


def select_measured(
    measured: Iterable[MeasuredAllToAll],
    cell: AllToAllCell,
    among: Iterable[str] = ALGORITHMS,
    expected: Expected | None = None,
) -> Selection | None:
    """The algorithm of `among` that was fastest near `cell`; None where none was measured on such links.

    Only times of one measured cell (logical_bytes, top_k, imbalance), in which every algorithm was timed, are compared.
    Where `cell` itself was measured, its fastest is taken. Else the nearest smaller and the nearest larger cell decide,
    seconds interpolated on log-log axes, with `expected` the ratio of measured to expected seconds instead. Groups of
    another shape stand in, with a note, if they cross the same kinds of links: the nearest in ranks, nodes and racks,
    with `expected` scaled by its ratio of the two shapes.
    """
    shape = _shape(cell)
    table = _table(measured, among)
    alike = [known for known in table if (known[1] > 1, known[2] > 1) == (cell.nodes > 1, cell.racks > 1)]
    if not alike:
        return None
    nearest = min(alike, key=lambda known: (_distance(known, shape), known))
    notes: tuple[str, ...] = ()
    if nearest != shape:
        notes = (f"all-to-all of {_group(*shape)}: not measured; {_group(*nearest)} stand in",)
    cells = table[nearest]
    around = _around(cells, _point(cell))
    seconds = _between(cells, around, nearest, cell, expected)
    where = tuple(_describe(point) for point in around)
    return Selection(
        config=min(seconds, key=lambda config: (seconds[config], config)),
        seconds={str(config): value for config, value in sorted(seconds.items(), key=lambda item: item[1])},
        why=f"fastest of {len(seconds)} as measured at {' and '.join(where)}",
        rests_on=tuple(f"{_group(*nearest)}: {near}" for near in where),
        notes=notes,
    )


def select_by_model(model: AllToAllModel, cell: AllToAllCell, among: Iterable[str] = ALGORITHMS) -> Selection:
    """The algorithm of `among` that the cost model finds fastest in `cell`, the first of equals."""
    seconds = {name: model.seconds(name, cell) for name in among}
    return Selection(
        config=AllToAllConfig(min(seconds, key=lambda name: seconds[name])),
        seconds=dict(sorted(seconds.items(), key=lambda item: item[1])),
        why=f"cheapest of {len(seconds)} by the cost model, from {model.source}",
        rests_on=(model.source,),
    )


def _table(
    measured: Iterable[MeasuredAllToAll], among: Iterable[str]
) -> dict[Shape, dict[Point, dict[AllToAllConfig, float]]]:
    """Seconds by shape of the group, cell and config; the mean of repeats, which may be loads of one imbalance."""
    found: dict[Shape, dict[Point, dict[AllToAllConfig, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    names = set(among)
    for row in measured:
        if row.algorithm in names:
            found[_shape(row)][_point(row)].setdefault(row.config, []).append(row.seconds)
    return {
        shape: {point: {config: fmean(times) for config, times in configs.items()} for point, configs in cells.items()}
        for shape, cells in found.items()
    }


def _shape(cell: AllToAllCell) -> Shape:
    return cell.ranks, cell.nodes, cell.racks


def _point(cell: AllToAllCell) -> Point:
    return cell.logical_bytes, cell.top_k, cell.imbalance


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Sum of |ln(a / b)| over each pair of numbers."""
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def _around(cells: Mapping[Point, Any], point: Point) -> list[Point]:
    """The measured cell at `point` where there is one, else the nearest one of no larger and of larger size.

    A cell on one side alone is taken only where it is nearer than twice what the other is: a far one says nothing.
    """
    sides = ([p for p in cells if p[0] <= point[0]], [p for p in cells if p[0] > point[0]])
    found = [min(side, key=lambda p: (_distance(p, point), p)) for side in sides if side]
    nearest = min(found, key=lambda p: _distance(p, point))
    near = _distance(nearest, point)
    if math.isclose(nearest[0], point[0]):
        return [nearest]
    near_enough = [p for p in found if p[1] == nearest[1] and _distance(p, point) <= max(2 * near, math.log(16))]
    return near_enough if set(cells[near_enough[0]]) & set(cells[near_enough[-1]]) else [nearest]


def _between(
    cells: Mapping[Point, Mapping[AllToAllConfig, float]],
    around: Sequence[Point],
    shape: Shape,
    cell: AllToAllCell,
    expected: Expected | None,
) -> dict[AllToAllConfig, float]:
    """Seconds in `cell` of every config that was measured at all points `around`, in groups of `shape`."""
    low, high = around[0], around[-1]
    if low == _point(cell) and shape == _shape(cell):
        return dict(cells[low])
    share = math.log(cell.logical_bytes / low[0]) / math.log(high[0] / low[0]) if low != high else 0.0

    def over_expected(config: AllToAllConfig, point: Point) -> float:
        """Measured seconds over those that the model expects."""
        ranks, nodes, racks = shape
        size, top_k, imbalance = point
        where = replace(
            cell, ranks=ranks, nodes=nodes, racks=racks, logical_bytes=size, top_k=top_k, imbalance=imbalance
        )
        return cells[point][config] / (expected(config, where) if expected else 1.0)

    def seconds(config: AllToAllConfig) -> float:
        between = over_expected(config, low) ** (1 - share) * over_expected(config, high) ** share
        return float(between * (expected(config, cell) if expected else 1.0))

    return {config: seconds(config) for config in cells[low] if config in cells[high]}


def _group(ranks: int, nodes: int, racks: int) -> str:
    return f"groups of {ranks} ranks on {nodes} nodes in {racks} rack{'s' if racks > 1 else ''}"


def _describe(point: Point) -> str:
    size, top_k, imbalance = point
    return f"{size / 1e3:.4g} kB a rank, top_k {top_k}, imbalance {imbalance:.2f}"
