"""The verdicts and the cells as tables: for a terminal, and as text for reports."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from piper_hpc.report.units import seconds, size
from piper_hpc.studies.all_to_all.rows import MeasuredCell
from piper_hpc.studies.all_to_all.verdicts import SHOWN, AutoChoice, Verdict, auto_choices, flat_share

VERDICT_COLUMNS = ("bar", "machine, load", "found", "must be", "", "note")
WORDS = {True: "met", False: "MISSED", None: "not judged"}
TextTable = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Columns and lines."""
STYLES = {True: "green", False: "bold red", None: "yellow"}


def verdict_cells(verdict: Verdict) -> tuple[str, ...]:
    """One verdict as text."""
    word = "" if verdict.bar == SHOWN else WORDS[verdict.met]
    return (verdict.what, verdict.where, verdict.value, verdict.bar, word, verdict.note)


def verdict_counts(found: Sequence[Verdict]) -> str:
    """How many bars were met, missed and not judged."""
    of_bars = [verdict.met for verdict in found if verdict.bar != SHOWN]
    return ", ".join(f"{of_bars.count(met)} {word.lower()}" for met, word in WORDS.items())


def verdict_table(found: Sequence[Verdict]) -> Table:
    """All verdicts for a terminal."""
    table = Table(title="bench-a2a: median \\[p5, p95] of ratios within one iteration", title_justify="left", box=None,
                  header_style="dim", pad_edge=False)  # fmt: skip
    for column in VERDICT_COLUMNS:
        table.add_column(column, overflow="fold")
    for verdict in found:
        *cells, note = verdict_cells(verdict)
        cells[4] = f"[{STYLES[verdict.met]}]{cells[4]}[/]"
        table.add_row(*cells, f"[dim]{note}[/]")
    return table


def cell_tables(measured: Sequence[MeasuredCell]) -> list[TextTable]:
    """Columns and lines of one machine's cells: one table for all that have the same variants."""
    choices = {id(choice.cell): choice for choice in auto_choices(measured)}
    alike: dict[tuple[str, ...], list[MeasuredCell]] = {}
    for cell in measured:
        alike.setdefault(tuple(timed.name for timed in cell.variants), []).append(cell)
    return [
        (
            ("load", "a rank", "imbalance", "n", "flat of wire", *names, "best, effective", "auto"),
            [_line(cell, choices.get(id(cell))) for cell in cells],
        )
        for names, cells in alike.items()
    ]


def _line(cell: MeasuredCell, choice: AutoChoice | None) -> tuple[str, ...]:
    """A cell: median and half the 5-95 % range of each variant, the logical bytes of a rank over the time of the
    family's quickest, and what `auto` takes."""
    first, share = cell.variants[0].row, flat_share(cell)
    return (
        cell.label,
        size(cell.logical_bytes),
        f"{first['imbalance']:.2f}",
        str(first["n"]),
        "" if share is None else f"{100 * share:.0f} %",
        *(f"{seconds(timed.median_s)} ±{100 * timed.spread:.0f} %" for timed in cell.variants),
        f"{1e-6 * cell.logical_bytes / min(timed.median_s for timed in cell.family):.3g} MB/s",
        "" if choice is None else f"{choice.chosen} ({choice.of_best:.2f} of best)",
    )


def machine_tables(machine: str, measured: Sequence[MeasuredCell]) -> list[Table]:
    """The cells of one machine for a terminal."""
    rates = measured[0].variants[0].row["link_bytes_per_s"]
    links = ", ".join(f"{kind} {rate * 8e-6:.0f} Mbit/s" for kind, rate in rates.items())
    title: str | None = f"{machine} ({links}): dispatch and combine, slowest rank"
    made = []
    for columns, lines in cell_tables(measured):
        table = Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
        title = None
        for column in columns:
            table.add_column(column, justify="left" if column in ("load", "auto") else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        made.append(table)
    return made
