"""A plan at the terminal: ranked layouts, the front of time against memory, what was rejected, what limits the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.config import Experiment
from piper_hpc.config.workload import AS_SET
from piper_hpc.planner import Plan
from piper_hpc.spec import Layout, Prediction

GIB = 2**30

DEGREES = ("pp", "vpp", "ep", "etp", "tp", "cp", "dp")
ALWAYS = ("pp", "ep", "dp")
"""Degrees that are named also where all layouts have 1."""

HEADS = {"micro_batch": "batch", "all_to_all": "all-to-all"}
FRONT = 10
"""Points of the front that are printed; the document has all."""

KEPT = ("layout", "step", "peak", "batch", "ranks", "MFU", "schedule", "recompute", "zero", "all-to-all")
"""Columns that a narrow terminal keeps longest, the most important first; those not named here go before them."""

LEFT = ("layout", "constraint", "relaxed")
"""Columns of words, which begin at their left edge."""


@dataclass(frozen=True)
class Column:
    """A column: its head, a name and perhaps a unit, and a cell for each row."""

    head: str
    cells: list[str]

    @property
    def name(self) -> str:
        """The head without its unit."""
        return self.head.split(" ")[0]


def show(found: Plan, experiment: Experiment, source: Mapping[str, str], console: Console) -> None:
    """Everything, section by section. source: where the workload's `sequence` and `global_batch` are from."""
    cluster, workload = experiment.cluster, found.workload
    lines = [
        f"[bold]{experiment.model.name}[/] on {cluster.name}, {cluster.nodes * cluster.ranks_per_node} ranks, "
        f"{workload.global_batch} sequences of {workload.sequence} tokens, {workload.recipe.name}, "
        f"executor {found.executor}, by {found.rank_by}"
    ]
    taken = {where: [fact for fact in source if source[fact] == where] for where in source.values() if where != AS_SET}
    lines += [f"{' and '.join(facts)}: {where}" for where, facts in taken.items()]
    if taken:
        lines[-1] += f"; {', '.join(f'train.{fact}' for facts in taken.values() for fact in facts)} set others"
    _print_lines(lines, console)
    if found.candidates:
        _layouts(found, experiment.plan.shades, console)
    fit = (
        f"{found.feasible:,} layouts fit: {found.fitting:,} evaluated, {found.pruned:,} excluded by a bound; "
        f"{found.searched:,} evaluated in all, in {found.seconds:.2f} s"
    )
    _print_lines([fit, *_rejected(found)], console)
    if not found.candidates:
        return
    if len(found.pareto) > 1:
        _front(found, console)
    if found.limits is not None:
        _limits(found.limits, found.memory_headroom, console)
    best = found.candidates[0]
    notes = [note for note in best.notes if note.startswith("all_to_all=")]
    _print_lines([*notes, f"rests on: {best.calibration['source']}", *constants(best.calibration)], console)


def _constant(constant: Mapping[str, Any]) -> str:
    if "bytes_per_s" in constant:
        return f"{constant['bytes_per_s'] / 1e9:.3g} GB/s"
    return f"{1e6 * constant['time_s']:.3g} us" if "time_s" in constant else f"{constant['share']:.3g}"


def constants(evidence: Mapping[str, Any]) -> Iterator[str]:
    """Which constants of the device and its links were measured, and which were not; format=json has every source."""
    if not evidence["measured"]:
        return
    for measured, title in ((True, "measured here"), (False, "from data sheets and published runs")):
        named = [
            f"{name} {_constant(constant)}"
            for name, constant in evidence.get("constants", {}).items()
            if constant["measured"] is measured
        ]
        if named:
            yield f"{title}: {', '.join(named)}"


def _print_lines(lines: Sequence[str], console: Console) -> None:
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _rejected(found: Plan) -> list[str]:
    """Two lines: layouts that the machine or the user excludes, and combinations that are no layouts at all.

    Where nothing is left every rule has its line: one of them must be bent.
    """
    counts = sorted(found.rejected.items(), key=lambda item: -item[1])
    if not found.candidates:
        return [f"rejected {count:,}: {reason}" for reason, count in counts]
    excluded = [f"{count:,}: {reason}" for reason, count in counts if _excludes(reason)]
    rest = {reason: count for reason, count in counts if not _excludes(reason)}
    lines = [f"rejected {'; '.join(excluded)}"] if excluded else []
    if rest:
        rules = dict.fromkeys(reason.split(":")[0] for reason in rest)
        total = f"{sum(rest.values()):,} combinations"
        lines.append(f"{total} are no layouts: {', '.join(rules)} (format=json counts each)")
    return lines


def _excludes(reason: str) -> bool:
    return reason.startswith(("Eq 10", "Eq 11"))


def _degrees(layouts: Sequence[Layout]) -> Callable[[Layout], str]:
    """How the degrees of these layouts are written: `pp16x2 ep64 dp2`, two chunks a rank in each of 16 stages."""
    shown = [axis for axis in DEGREES if axis in ALWAYS or any(getattr(one, axis) > 1 for one in layouts)]

    def text(one: Layout) -> str:
        pipeline = f"pp{one.pp}x{one.vpp}" if "vpp" in shown else f"pp{one.pp}"
        return " ".join([pipeline, *(f"{axis}{getattr(one, axis)}" for axis in shown if axis not in ("pp", "vpp"))])

    return text


def _layout_columns(layouts: Sequence[Layout]) -> tuple[list[Column], str]:
    """Columns that tell the layouts apart, and what all have alike beside the defaults."""
    default = asdict(Layout())
    others = [axis for axis in default if axis not in DEGREES]
    columns = [Column("layout", list(map(_degrees(layouts), layouts)))]
    alike = []
    for axis in others:
        values = [getattr(one, axis) for one in layouts]
        if axis == "micro_batch" or len(set(values)) > 1:
            columns.append(Column(HEADS.get(axis, axis), list(map(_text, values))))
        elif values[0] != default[axis]:
            alike.append(f"{axis}={_text(values[0])}")
    return columns, f"all: {' '.join(alike)}" if alike else ""


def _text(value: Any) -> str:
    """A value of a layout; layers of stages as `3+2+2+1`, and where they are not given `even`."""
    return ("+".join(map(str, value)) or "even") if isinstance(value, tuple) else str(value)


def _table(columns: Sequence[Column]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column.head, justify="left" if column.head in LEFT else "right", no_wrap=True)
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*row)
    return table


def _width(columns: Sequence[Column], console: Console) -> int:
    return console.measure(_table(columns), options=console.options.update(width=1000)).maximum


def _print(columns: Sequence[Column], console: Console) -> None:
    """A table whole: where the terminal is narrower, a line that wraps is better than a figure cut short."""
    before = console.width
    console.width = max(before, _width(columns, console))
    console.print(_table(columns))
    console.width = before


def _fitted(title: Sequence[str], columns: Sequence[Column], console: Console) -> None:
    """A table without the columns that the terminal is too narrow for, which the line above it names."""
    kept, dropped = list(columns), []
    while _width(kept, console) > console.width and len(kept) > 1:
        last = max(kept, key=lambda column: KEPT.index(column.name) if column.name in KEPT else len(KEPT))
        kept.remove(last)
        dropped.append(last.name)
    narrow = f"too narrow for: {', '.join(dropped)}" if dropped else ""
    _print_lines(["; ".join(filter(None, [*title, narrow]))], console)
    _print(kept, console)


def _layouts(found: Plan, shades: bool, console: Console) -> None:
    """The best of each shape, or every candidate."""
    shown = found.candidates if shades else found.shapes
    columns, alike = _layout_columns([one.layout for one in shown])
    on_front = [one.layout in {point.layout for point in found.pareto} for one in shown]
    peaks = [max(one.peak_memory_bytes) for one in shown]
    first = columns[0].cells
    rows = [f"{f'{rank}*' if star else rank:<4}{first[rank - 1]}" for rank, star in enumerate(on_front, start=1)]
    figures = [
        _steps([one.step_time_s for one in shown]),
        Column("tokens/s", [f"{one.tokens_per_s:,.0f}" for one in shown]),
        Column("MFU %", [f"{100 * one.mfu:.1f}" for one in shown]),
        Column("bubble %", list(map(_bubble, shown))),
        Column("peak GiB", [_figure(peak / GIB, 3) for peak in peaks]),
        Column("free", [_figure((found.memory_bytes - peak) / GIB, 3) for peak in peaks]),
    ]
    what = f"the {len(shown)} best layouts" if shades else "best of each (pp, ep, tp, cp); all with plan.shades=true"
    title = [what, "* on the front" if any(on_front) else "", alike]
    _fitted(title, [Column("layout", rows), *columns[1:], *figures], console)


def _steps(seconds: Sequence[float]) -> Column:
    """Step times in one unit: milliseconds where the fastest takes less than a second."""
    if min(seconds) < 1:
        return Column("step ms", [_figure(1e3 * one, 4) for one in seconds])
    return Column("step s", [_figure(one, 4) for one in seconds])


def _figure(value: float, digits: int) -> str:
    """With so many significant digits, zeros too, and all before the point: 74 is `74.0`, 12345 is `12,345`."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def _bubble(candidate: Prediction) -> str:
    return "-" if candidate.bubble_fraction is None else f"{100 * candidate.bubble_fraction:.1f}"


def _front(found: Plan, console: Console) -> None:
    """Points spread over the front, the fastest and the smallest included."""
    last = len(found.pareto) - 1
    picked = sorted({round(index * last / min(FRONT - 1, last)) for index in range(min(FRONT, last + 1))})
    points = [found.pareto[index] for index in picked]
    columns, alike = _layout_columns([one.layout for one in points])
    if len({one.layout.ranks for one in found.pareto}) > 1:
        columns.append(Column("ranks", [str(one.layout.ranks) for one in points]))
    columns += [
        _steps([one.step_time_s for one in points]),
        Column("peak GiB", [_figure(one.peak_bytes / GIB, 3) for one in points]),
    ]
    title = f"front of step time against memory, in closed form: {len(points)} of {last + 1} layouts"
    _fitted([title, alike], columns, console)


def _limits(limits: dict[str, Any], memory_headroom: float, console: Console) -> None:
    largest = ", ".join(
        f"{one['term'].removesuffix('_s')} {100 * one['share']:.0f} %" for one in limits["largest_terms"]
    )
    memory = limits["memory"]
    kept = f" ({100 * memory_headroom:g} % are kept free, plan.memory_headroom)" if memory_headroom else ""
    lines = [
        f"the best spends its step on: {largest}",
        f"its fullest rank is {memory['rank']} (stage {memory['stage']}): {memory['peak_bytes'] / GIB:.3g} of "
        f"{memory['available_bytes'] / GIB:.3g} GiB{kept}, mostly {memory['largest_kind'].replace('_', ' ')} "
        f"({memory['largest_kind_bytes'] / GIB:.3g} GiB)",
    ]
    eq_10 = limits["eq_10"]
    if eq_10["crosses"]:
        words = f"Eq 10: its expert groups leave the {eq_10['domain']}; all-to-all takes {eq_10['all_to_all_s']:.3g} s"
        if eq_10["inside"] is None:
            lines.append(f"{words}, and no layout that stays inside fits")
        else:
            layout = eq_10["inside"]
            name = f"pp={layout['pp']} ep={layout['ep']}"
            lines.append(f"{words}; the best that stays inside ({name}) takes {eq_10['inside_costs_pct']:.1f} % longer")
    _print_lines([*lines, "what would lift it:"], console)
    lifts = limits["lifts"]
    columns = [
        Column("constraint", [lift["constraint"] for lift in lifts]),
        Column("relaxed", [lift["change"] for lift in lifts]),
        Column("tokens/s", [f"{lift['gain_pct']:+.1f} %" for lift in lifts]),
    ]
    _print(columns, console)
