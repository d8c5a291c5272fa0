"""The dashboard of a sweep or of some runs: one page that opens offline, with its data in it as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from piper_hpc.report.points import PointRow, regret, regret_line, totals
from piper_hpc.report.units import size
from piper_hpc.runs import status as statuses
from piper_hpc.runs.folder import utc_now

TEMPLATE = Path(__file__).with_name("dashboard.html.j2")
REFRESH_S = 15
"""How often an open page looks for a newer one while points run or wait."""
MOST_AXES = 6


@dataclass(frozen=True)
class Subject:
    """What a page is of. kind: `grid`, `plan` or `runs`; command: empty of runs; folder: where the record is."""

    name: str
    kind: str
    command: str
    folder: str


def page(subject: Subject, rows: Sequence[PointRow]) -> str:
    """The page. Raises ImportError without the extra `report` (plotly and jinja2)."""
    import jinja2

    from piper_hpc.report import dashboard_figures as draw
    from piper_hpc.report.figures import html

    found = totals(rows)
    axes = list(dict.fromkeys(key for row in rows for key in row.axes))
    # In the order of the page, as the first carries plotly for all.
    drawn = {"accuracy": draw.predicted_against_measured(rows)}
    drawn |= {f"axis-{number}": draw.rate_over_axis(rows, axis) for number, axis in enumerate(axes[:MOST_AXES])}
    drawn |= {"memory": draw.memory(rows)}
    of_plan = regret(rows) if subject.kind == "plan" else None
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        subject=subject,
        state="ended" if found.is_over else "running",
        refresh_s=0 if found.is_over else REFRESH_S,
        made=utc_now(),
        axes=axes,
        cards=_cards(rows),
        counts=found.by_state,
        total=len(rows),
        regret=regret_line(of_plan) if of_plan is not None else "",
        memory_line=_memory_line(rows),
        figures=html({name: figure for name, figure in drawn.items() if figure is not None}),
        failures=[_failure(row) for row in rows if row.state in ("failed", "cancelled")],
        refused=[row for row in rows if row.state == "refused"],
        # `</script>` in a value would end the element.
        data=json.dumps({"axes": axes, "points": [_shown(row) for row in rows]}).replace("<", "\\u003c"),
    )


def _shown(row: PointRow) -> dict[str, Any]:
    """What the table shows of a point; logs are in the page once."""
    return {key: value for key, value in asdict(row).items() if key != "log"}


def _cards(rows: Sequence[PointRow]) -> list[tuple[str, str]]:
    found = totals(rows)
    may_run = [row for row in rows if row.state != "refused"]
    completed = found.by_state.get("completed", 0)
    cards = [(f"{completed} / {len(may_run)}", "points completed")]
    if failed := found.by_state.get("failed", 0) + found.by_state.get("cancelled", 0):
        cards.append((str(failed), "failed"))
    cards.append((f"{found.spent_node_hours:,.3g}", "node-hours spent"))
    if not found.is_over:
        cards.append((f"{found.left_node_hours:,.3g}", "node-hours left, predicted"))
    best = max((row for row in rows if row.tokens_per_s), key=lambda row: row.tokens_per_s or 0.0, default=None)
    if best is not None:
        cards.append((f"{best.tokens_per_s:,.0f}", f"most tokens/s, point {best.index}"))
    errors = sorted(abs(row.error_pct) for row in rows if row.error_pct is not None)
    if errors:
        cards.append((f"{errors[len(errors) // 2]:.1f} %", "median error of the predicted step"))
    return cards


def _memory_line(rows: Sequence[PointRow]) -> str:
    shares = [((row.peak_bytes or 0) / row.limit_bytes, row) for row in rows if row.limit_bytes and row.peak_bytes]
    if not shares:
        return ""
    share, row = max(shares, key=lambda pair: pair[0])
    of = f"{size(row.peak_bytes or 0)} of {size(row.limit_bytes or 0)}"
    return f"The fullest rank of all is of point {row.index}: {of}, {100 * share:.1f} %."


def _failure(row: PointRow) -> dict[str, Any]:
    advice: dict[str, str] = getattr(statuses, "ADVICE", {})
    meaning = statuses.FAILURE_CLASSES.get(row.failure_class or "", "")
    told = advice.get(row.failure_class or "", "").replace("RUN", row.run_id or "RUN")
    return {"row": row, "meaning": meaning, "advice": told}
