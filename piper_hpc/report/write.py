"""The report of a training run: report.html (offline, one file) and report.md, beside its record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piper_hpc.report import all_to_all, balance, facts
from piper_hpc.report.load import metrics, timed
from piper_hpc.report.table import COLUMNS, Row, cells, predicted_against_measured, with_measured_routing
from piper_hpc.runs import RunFolder

TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(run: RunFolder) -> list[Path]:
    """Write both reports and return the paths of those written.

    Without the optional extra `report` (plotly and jinja2) the HTML is left out, and a line on stderr says how to get
    it. Raises UsageError for a run that trained no step.
    """
    rows = metrics(run)
    table = predicted_against_measured(run)
    written = [run.write_report("report.md", markdown(run, rows, table))]
    try:
        page = html(run, rows, table)
    except ImportError as error:
        again = f"pip install plotly jinja2, then: python -m analysis.report {run.path}"
        print(f"report.html was not written: {error.name} is not installed; get it with: {again}", file=sys.stderr)
        return written
    return [run.write_report("report.html", page), *written]


def write_missing(run: RunFolder, state: str) -> None:
    """Write the report of a run that trained and completed while no launcher waited for it. state: of the run, as seen
    by whoever asks."""
    if state == "completed" and run.metrics() and not (run.path / "report.md").exists():
        write(run)


def markdown(run: RunFolder, rows: Sequence[dict[str, Any]], table: Sequence[Row]) -> str:
    """The tables of the report."""
    lines = [
        f"# {run.run_id}: {run.status().state}",
        "",
        facts.summary_sentence(run, rows),
        "",
        _markdown_table(("", ""), [(name, value) for value, name in facts.key_figures(rows, table)]),
        "",
        "## Predicted against measured",
        "",
        f"{facts.calibration_note(run.prediction())} {facts.measurement_note(rows)}",
        "",
        _markdown_table(COLUMNS, [cells(row) for row in table]),
    ]
    routed = with_measured_routing(run)
    if routed is not None:
        lines += ["", f"{routed.line[0].upper()}{routed.line[1:]}."]
    if levels := all_to_all.levels(rows, run.prediction()):
        lines += ["", "## Exchange of experts", "", *facts.selected_algorithms(run), all_to_all.line(rows), ""]
        lines.append(_markdown_table(all_to_all.COLUMNS, [level.cells() for level in levels]))
    if balance.looks(rows):
        lines += ["", "## Balance", "", balance.line(rows)]
        if moved := balance.moves(rows):
            lines += ["", _markdown_table(balance.COLUMNS, [balance.cells(row) for row in moved])]
    for title, known in facts.provenance(run, rows).items():
        lines += ["", f"## {title}", "", _markdown_table(("", ""), list(known.items()))]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is aligned left and all others right, unless it is a list of facts."""
    align = [":--", *("--:" if len(columns) > 2 else ":--" for _ in columns[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, align, *rows))


def html(run: RunFolder, rows: Sequence[dict[str, Any]], table: Sequence[Row]) -> str:
    """The page. Raises ImportError without the extra `report`."""
    import jinja2

    from piper_hpc.report import figures

    prediction, moved = run.prediction(), balance.moves(rows)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    # In the order of the page; what shows terms is left out where there are none.
    drawn = figures.html(
        ({"terms": figures.predicted_against_measured(table)} if timed(rows) else {})
        | {"loss": figures.loss_curve(rows, run.config()["model"]["vocab"]), "throughput": figures.throughput(rows)}
        | ({"breakdown": figures.breakdown(rows), "stages": figures.stages(rows)} if timed(rows) else {})
        | {"experts": figures.expert_load(rows)}
        | ({"ranks": figures.rank_load(rows, moved)} if balance.looks(rows) else {})
        | (
            {"experts_over_time": figures.experts_over_time(rows, moved)}
            if any("routed" in row for row in rows)
            else {}
        )
    )
    return environment.from_string(TEMPLATE.read_text()).render(
        run_id=run.run_id,
        folder=run.path,
        state=run.status().state,
        summary_sentence=facts.summary_sentence(run, rows),
        key_figures=facts.key_figures(rows, table),
        calibration_note=facts.calibration_note(prediction),
        measurement_note=facts.measurement_note(rows),
        columns=COLUMNS,
        table=[(row, cells(row)) for row in table],
        colours=figures.COLOURS,
        notes=prediction["notes"] if prediction else [],
        figures=drawn,
        exchange=[level.cells() for level in all_to_all.levels(rows, prediction)],
        exchange_columns=all_to_all.COLUMNS,
        exchange_lines=[*facts.selected_algorithms(run), all_to_all.line(rows)],
        balance_line=balance.line(rows) if balance.looks(rows) else "",
        balance_columns=balance.COLUMNS,
        balance=[balance.cells(row) for row in moved],
        provenance=facts.provenance(run, rows),
    )
