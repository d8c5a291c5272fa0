"""A plan at the terminal: ranked layouts, the front of time against memory, what was rejected, what limits the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.config import Experiment
from piper_hpc.planner import Plan
from piper_hpc.spec import Layout, Prediction

GIB = 2**30

ALWAYS = ("pp", "ep", "dp", "micro_batch")
"""Axes with a column in every table. The others have one where they differ, and a line above where all are alike."""

HEADS = {"micro_batch": "batch", "all_to_all": "all-to-all"}
FRONT = 10
"""Points of the front that are printed; the document has all."""


def show(found: Plan, asked: Experiment, console: Console) -> None:
    """Everything, section by section."""
    ranks = asked.cluster.nodes * asked.cluster.ranks_per_node
    console.print(
        f"[bold]{asked.model.name}[/] on {asked.cluster.name}, {ranks} ranks, {found.workload.global_batch} sequences "
        f"of {found.workload.sequence} tokens, {found.workload.recipe.name}, executor {found.executor}, "
        f"by {found.rank_by}",
        highlight=False,
    )
    if found.candidates:
        _candidates(found, console)
    console.print(
        f"{found.feasible:,} layouts fit: {found.fitting:,} evaluated, {found.pruned:,} excluded by a bound; "
        f"{found.searched:,} evaluated in all, in {found.seconds:.2f} s",
        highlight=False,
    )
    for reason, count in sorted(found.rejected.items(), key=lambda item: -item[1]):
        console.print(f"rejected {count:,}: {reason}", highlight=False)
    if not found.candidates:
        return
    if len(found.pareto) > 1:
        _front(found, console)
    if found.limits is not None:
        _limits(found.limits, console)
    for note in found.candidates[0].notes:
        if note.startswith("all_to_all="):
            console.print(note, highlight=False, soft_wrap=True)
    console.print(f"rests on: {found.candidates[0].calibration['source']}", highlight=False)


def _axes(layouts: Sequence[Layout]) -> tuple[list[str], str]:
    """Axes that need a column, and what all layouts have alike beside the defaults."""
    default = asdict(Layout())
    differ = {axis: len({getattr(layout, axis) for layout in layouts}) > 1 for axis in default}
    columns = [axis for axis in default if axis in ALWAYS or differ[axis]]
    same = {axis: value for axis, value in asdict(layouts[0]).items() if axis not in columns}
    alike = [f"{axis}={value}" for axis, value in same.items() if value != default[axis]]
    return columns, f"all: {' '.join(alike)}" if alike else ""


def _table(names: Sequence[str]) -> Table:
    columns = Table(box=None, header_style="bold")
    for name in names:
        columns.add_column(HEADS.get(name, name), justify="right", no_wrap=True)
    return columns


def _print(title: str, columns: Table, console: Console) -> None:
    """Whole, also where the terminal is narrower: a figure cut short is no figure."""
    if title:
        console.print(title, highlight=False, soft_wrap=True)
    width = max(console.width, console.measure(columns, options=console.options.update(width=1000)).maximum)
    console.print(columns, width=width, crop=False, no_wrap=True)


def _candidates(found: Plan, console: Console) -> None:
    axes, alike = _axes([candidate.layout for candidate in found.candidates])
    columns = _table(["", *axes, "step", "tokens/s", "MFU", "bubble", "peak", "free", "front"])
    front = {one.layout for one in found.pareto}
    for rank, candidate in enumerate(found.candidates, start=1):
        peak = max(candidate.peak_memory_bytes)
        columns.add_row(
            str(rank),
            *(str(getattr(candidate.layout, axis)) for axis in axes),
            f"{candidate.step_time_s:.4g} s",
            f"{candidate.tokens_per_s:,.0f}",
            f"{100 * candidate.mfu:.1f} %",
            _bubble(candidate),
            f"{peak / GIB:.3g} GiB",
            f"{(found.memory_bytes - peak) / GIB:.3g} GiB",
            "*" if candidate.layout in front else "",
        )
    _print(alike, columns, console)


def _bubble(candidate: Prediction) -> str:
    return "-" if candidate.bubble_fraction is None else f"{100 * candidate.bubble_fraction:.1f} %"


def _front(found: Plan, console: Console) -> None:
    """Points spread over the front, the fastest and the smallest included."""
    last = len(found.pareto) - 1
    picked = sorted({round(index * last / min(FRONT - 1, last)) for index in range(min(FRONT, last + 1))})
    points = [found.pareto[index] for index in picked]
    axes, alike = _axes([one.layout for one in points])
    several = len({one.layout.ranks for one in found.pareto}) > 1
    title = f"front of step time against memory, in closed form: {len(points)} of {last + 1} layouts; {alike}"
    columns = _table([*axes, *(["ranks"] if several else []), "step", "peak"])
    for one in points:
        columns.add_row(
            *(str(getattr(one.layout, axis)) for axis in axes),
            *([str(one.layout.ranks)] if several else []),
            f"{one.step_time_s:.4g} s",
            f"{one.peak_bytes / GIB:.3g} GiB",
        )
    _print(title.removesuffix("; "), columns, console)


def _limits(limits: dict[str, Any], console: Console) -> None:
    largest = ", ".join(
        f"{one['term'].removesuffix('_s')} {100 * one['share']:.0f} %" for one in limits["largest_terms"]
    )
    memory = limits["memory"]
    lines = [
        f"the best spends its step on: {largest}",
        f"its fullest rank is {memory['rank']} (stage {memory['stage']}): {memory['peak_bytes'] / GIB:.3g} of "
        f"{memory['available_bytes'] / GIB:.3g} GiB, mostly {memory['largest_kind'].replace('_', ' ')} "
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
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    console.print("what would lift it:")
    columns = Table(box=None, header_style="bold")
    for name, justify in (("constraint", "left"), ("relaxed", "left"), ("tokens/s", "right")):
        columns.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for lift in limits["lifts"]:
        columns.add_row(lift["constraint"], lift["change"], f"{lift['gain_pct']:+.1f} %")
    console.print(columns)
