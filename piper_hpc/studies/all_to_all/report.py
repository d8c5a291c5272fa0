"""The benchmark in a run's report: as Markdown, and as one offline page."""

from __future__ import annotations

import html as markup
import shlex
from collections.abc import Sequence
from pathlib import Path

from piper_hpc.report.units import count
from piper_hpc.runs import RunFolder
from piper_hpc.studies.all_to_all.rows import MeasuredCell, cells, machines
from piper_hpc.studies.all_to_all.show import VERDICT_COLUMNS, TextTable, cell_tables, verdict_cells
from piper_hpc.studies.all_to_all.verdicts import verdicts

STYLE = """body { margin: 0 auto; max-width: 1500px; padding: 32px; color: #1c2733; font: 14px/1.5 system-ui }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; margin: 8px 0 28px }
th { color: #66727f; font-weight: 500; text-align: left } th, td { padding: 4px 10px; border-bottom: 1px solid #e6eaee }
p { color: #66727f; max-width: 100ch }"""

Section = tuple[str, str, Sequence[TextTable]]
"""A title, a caption, and tables."""


def sections(run: RunFolder) -> list[Section]:
    """What the benchmark has to say of a run; empty for a run without its rows."""
    measured = cells(run.measurements())
    if not measured:
        return []
    caption = (
        "Seconds from (tokens, expert ids, weights) to combined tokens, counts exchange included, of the slowest rank; "
        "all algorithms in turn within each iteration. Ratios: median [p5, p95] over the iterations that calibration "
        "does not see; chunks are chosen by those that it does."
    )
    bars = [verdict_cells(verdict) for verdict in verdicts(measured)]
    found: list[Section] = [("All-to-all: the bars", caption, [(VERDICT_COLUMNS, bars)])]
    for machine in machines(measured):
        own = [cell for cell in measured if cell.machine == machine]
        found.append((f"All-to-all on {machine}", _machine(own[0]), cell_tables(own)))
    return found


def _machine(cell: MeasuredCell) -> str:
    row = cell.variants[0].row
    group, links = row["group"], row["link_bytes_per_s"]
    rates = ", ".join(f"{kind} {count(8 * rate, 'bit/s')}" for kind, rate in links.items())
    return (
        f"{group['ranks']} ranks on {group['nodes']} nodes in {group['racks']} racks of the testbed; links {rates}; "
        f"{row['cpu_share']:.3g} of a core a rank; TCP {row.get('congestion_control', 'unknown')}. "
        "Median ± half the 5-95 % range."
    )


def write(run: RunFolder) -> list[Path]:
    """Write report.html and report.md; returns their paths."""
    return [run.write_report("report.html", html(run)), run.write_report("report.md", markdown(run))]


def markdown(run: RunFolder) -> str:
    """All sections as Markdown."""
    lines = [f"# {run.run_id}: {run.status().state}", "", _facts(run), ""]
    for head, caption, tables in sections(run):
        lines += [f"## {head}", "", caption, ""]
        for columns, body in tables:
            lines += ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *body)]
            lines.append("")
    return "\n".join(lines)


def html(run: RunFolder) -> str:
    """All sections as one page."""
    parts = []
    for head, caption, tables in sections(run):
        parts.append(f"<h2>{markup.escape(head)}</h2><p>{markup.escape(caption)}</p>")
        parts += [
            f"<table>{_row('th', columns)}{''.join(_row('td', line) for line in body)}</table>"
            for columns, body in tables
        ]
    title = f"{run.run_id}: {run.status().state}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><p>{markup.escape(_facts(run))}</p>{''.join(parts)}</html>\n"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{markup.escape(text)}</{tag}>" for text in cells) + "</tr>"


def _facts(run: RunFolder) -> str:
    manifest = run.manifest()
    commit = (manifest.get("git") or {}).get("commit", "unknown")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    mpi = next((row["mpi"] for row in run.measurements() if row.get("mpi")), "no MPI")
    return f"{shlex.join(manifest.get('command', []))} on {manifest.get('host')}, commit {commit}; {versions}; {mpi}."
