"""`all_to_all=auto`: which algorithm a group takes, by what the cluster measured, or by its links where it did not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from piper_hpc.resource_model.eager.exchange.model import ExchangeModel
from piper_hpc.spec import ALGORITHMS, ExchangeCell, MeasuredExchange

Way = tuple[str, int]
"""An algorithm and its chunks, 0 where it has none or takes the executor's own number."""

Point = tuple[float, int, float]
"""Where a measured cell lies: logical bytes, top_k, imbalance."""

Shape = tuple[int, int, int]
"""Ranks, nodes and racks of a group."""

Expected = Callable[[Way, ExchangeCell], float]
"""Seconds that a cost model finds, whose error changes less from cell to cell than the seconds do."""


@dataclass(frozen=True)
class Choice:
    """algorithm and chunks: what to take (chunks 0: the executor's own number); seconds: of each candidate, expected of
    a dispatch and combine, by `algorithm` or `algorithm/chunks`; why: in one sentence, for people; rests_on: the cells
    or the model it was chosen by; notes: what a reader must know, such as another group that stood in."""

    algorithm: str
    chunks: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    why: str = ""
    rests_on: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {
            "algorithm": self.algorithm,
            "chunks": self.chunks or None,
            "why": self.why,
            "seconds": dict(self.seconds),
            "rests_on": list(self.rests_on),
            "notes": list(self.notes),
        }


def choose(
    exchanges: Iterable[MeasuredExchange],
    cell: ExchangeCell,
    among: Sequence[str] = ALGORITHMS,
    expected: Expected | None = None,
) -> Choice | None:
    """The algorithm that was fastest near the cell that is asked about; None where no such thing was measured.

    A measured cell is (logical_bytes, top_k, imbalance) with every algorithm timed in it, so that only times of one
    cell are compared. One that was measured as asked decides alone: its fastest. Else the nearest smaller and the
    nearest larger cell do, seconds interpolated on log-log axes, with `expected` what was measured over that. Groups of
    another shape stand in, with a note, if they cross the same kinds of links: the nearest in ranks, nodes and racks,
    with `expected` scaled by what it finds for the one shape over the other.
    """
    shape = _shape(cell)
    table = _table(exchanges, among)
    alike = [known for known in table if (known[1] > 1, known[2] > 1) == (cell.nodes > 1, cell.racks > 1)]
    if not alike:
        return None
    nearest = min(alike, key=lambda known: (_apart(known, shape), known))
    notes: tuple[str, ...] = ()
    if nearest != shape:
        notes = (f"all-to-all of {_group(*shape)}: not measured; {_group(*nearest)} stand in",)
    cells = table[nearest]
    around = _around(cells, _point(cell))
    seconds = _between(cells, around, nearest, cell, expected)
    best = min(seconds, key=lambda way: (seconds[way], way))
    where = tuple(_told(point) for point in around)
    return Choice(
        algorithm=best[0],
        chunks=best[1],
        seconds={_way(way): value for way, value in sorted(seconds.items(), key=lambda item: item[1])},
        why=f"fastest of {len(seconds)} as measured at {' and '.join(where)}",
        rests_on=tuple(f"{_group(*nearest)}: {near}" for near in where),
        notes=notes,
    )


def cheapest(model: ExchangeModel, cell: ExchangeCell, among: Sequence[str] = ALGORITHMS) -> Choice:
    """The algorithm that the cost model finds fastest, the first of equals."""
    seconds = {name: model.seconds(name, cell) for name in among}
    best = min(among, key=lambda name: seconds[name])
    return Choice(
        algorithm=best,
        seconds=dict(sorted(seconds.items(), key=lambda item: item[1])),
        why=f"cheapest of {len(seconds)} by the cost model, from {model.source}",
        rests_on=(model.source,),
    )


def _table(exchanges: Iterable[MeasuredExchange], among: Sequence[str]) -> dict[Shape, dict[Point, dict[Way, float]]]:
    """Seconds by shape of the group, cell, and way; the mean of repeats, which may be loads of one imbalance."""
    found: dict[Shape, dict[Point, dict[Way, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    for row in exchanges:
        if row.algorithm in among:
            found[_shape(row)][_point(row)].setdefault((row.algorithm, row.chunks), []).append(row.seconds)
    return {
        shape: {point: {way: fmean(times) for way, times in ways.items()} for point, ways in cells.items()}
        for shape, cells in found.items()
    }


def _shape(cell: ExchangeCell) -> Shape:
    return cell.ranks, cell.nodes, cell.racks


def _point(cell: ExchangeCell) -> Point:
    return cell.logical_bytes, cell.top_k, cell.imbalance


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Distance as the sum of the powers of e between each pair of numbers."""
    return sum(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def _around(cells: Mapping[Point, Any], asked: Point) -> list[Point]:
    """The cell that is asked for if it was measured, else the nearest one of no larger and of larger size.

    A cell on one side alone is taken only where it is nearer than twice what the other is: a far one says nothing.
    """
    sides = ([p for p in cells if p[0] <= asked[0]], [p for p in cells if p[0] > asked[0]])
    found = [min(side, key=lambda p: (_apart(p, asked), p)) for side in sides if side]
    nearest = min(found, key=lambda p: _apart(p, asked))
    near = _apart(nearest, asked)
    if math.isclose(nearest[0], asked[0]):
        return [nearest]
    near_enough = [p for p in found if p[1] == nearest[1] and _apart(p, asked) <= max(2 * near, math.log(16))]
    return near_enough if set(cells[near_enough[0]]) & set(cells[near_enough[-1]]) else [nearest]


def _between(
    cells: Mapping[Point, Mapping[Way, float]],
    around: Sequence[Point],
    shape: Shape,
    asked: ExchangeCell,
    expected: Expected | None,
) -> dict[Way, float]:
    """Seconds in the cell that is asked about of every way that all cells `around` have, in groups of `shape`."""
    low, high = around[0], around[-1]
    if low == _point(asked) and shape == _shape(asked):
        return dict(cells[low])
    share = math.log(asked.logical_bytes / low[0]) / math.log(high[0] / low[0]) if low != high else 0.0

    def unexpected(way: Way, point: Point) -> float:
        """What was measured over what the model expects of it."""
        ranks, nodes, racks = shape
        size, top_k, imbalance = point
        where = replace(
            asked, ranks=ranks, nodes=nodes, racks=racks, logical_bytes=size, top_k=top_k, imbalance=imbalance
        )
        return cells[point][way] / (expected(way, where) if expected else 1.0)

    def seconds(way: Way) -> float:
        between = unexpected(way, low) ** (1 - share) * unexpected(way, high) ** share
        return float(between * (expected(way, asked) if expected else 1.0))

    return {way: seconds(way) for way in cells[low] if way in cells[high]}


def _way(way: Way) -> str:
    return f"{way[0]}/{way[1]}" if way[1] else way[0]


def _group(ranks: int, nodes: int, racks: int) -> str:
    return f"groups of {ranks} ranks on {nodes} nodes in {racks} rack{'s' if racks > 1 else ''}"


def _told(point: Point) -> str:
    size, top_k, imbalance = point
    return f"{size / 1e3:.4g} kB a rank, top_k {top_k}, imbalance {imbalance:.2f}"
