"""The verdicts and the cells as tables: for a terminal, and as text for reports."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from analysis.bench_a2a.rows import Measured
from analysis.bench_a2a.verdicts import SHOWN, Verdict, auto_choices, flat_share
from analysis.units import seconds, size

VERDICT_COLUMNS = ("bar", "machine, load", "found", "must be", "", "note")
WORDS = {True: "met", False: "MISSED", None: "not judged"}
STYLES = {True: "green", False: "bold red", None: "yellow"}


def verdict_cells(verdict: Verdict) -> tuple[str, ...]:
    """One verdict as text."""
    word = "" if verdict.bar == SHOWN else WORDS[verdict.met]
    return (verdict.what, verdict.where, verdict.value, verdict.bar, word, verdict.note)


def counted(found: Sequence[Verdict]) -> str:
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


def cell_columns(measured: Sequence[Measured]) -> tuple[str, ...]:
    """Heads of `cell_lines`: what a cell is, then every variant that any cell has."""
    return ("load", "a rank", "imbalance", "n", "flat of wire", *names(measured), "best, effective", "auto")


def names(measured: Sequence[Measured]) -> list[str]:
    """Variants of all cells, in the order of the first that has them."""
    return list(dict.fromkeys(timed.name for cell in measured for timed in cell.variants))


def cell_lines(measured: Sequence[Measured]) -> list[tuple[str, ...]]:
    """One line a cell of one machine: median and half the 5-95 % range of each variant, the logical bytes of a rank
    over the time of the family's quickest, and what `auto` takes."""
    shown = names(measured)
    chosen = {id(choice.cell): choice for choice in auto_choices(measured)}
    lines = []
    for cell in measured:
        by_name = {timed.name: timed for timed in cell.variants}
        share, choice = flat_share(cell), chosen.get(id(cell))
        lines.append(
            (
                cell.label,
                size(cell.logical_bytes),
                f"{cell.variants[0].row['imbalance']:.2f}",
                str(cell.variants[0].row["n"]),
                "" if share is None else f"{100 * share:.0f} %",
                *(
                    f"{seconds(by_name[name].median_s)} ±{100 * by_name[name].spread:.0f} %" if name in by_name else ""
                    for name in shown
                ),
                f"{1e-6 * cell.logical_bytes / min(timed.median_s for timed in cell.family):.3g} MB/s",
                "" if choice is None else f"{choice.chosen} ({choice.of_best:.2f} of best)",
            )
        )
    return lines


def cell_table(machine: str, measured: Sequence[Measured]) -> Table:
    """The cells of one machine for a terminal."""
    rates = measured[0].variants[0].row["link_bytes_per_s"]
    links = ", ".join(f"{kind} {rate * 8e-6:.0f} Mbit/s" for kind, rate in rates.items())
    table = Table(title=f"{machine} ({links}): dispatch and combine, slowest rank", title_justify="left", box=None,
                  header_style="dim", pad_edge=False)  # fmt: skip
    for column in cell_columns(measured):
        table.add_column(column, justify="left" if column in ("load", "auto") else "right", no_wrap=True)
    for line in cell_lines(measured):
        table.add_row(*line)
    return table
