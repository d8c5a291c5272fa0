"""Shared experts beside the exchange of routed rows, on the testbed (needs root): what overlap hides of waiting.

Each layer runs forward and backward without and with overlap in turn, its shared expert alone, and its exchange
alone. Only waiting can be hidden, not what the exchange itself computes, which counts against a rank's quota: the bar
is half of waiting or of the shared expert, whichever is less.

    python -m piper_hpc.studies.shared_overlap
    python -m piper_hpc.studies.shared_overlap --as-it-is --repeats 3
    python -m piper_hpc.studies.shared_overlap --show RUN

Exit codes: 0 the bar is met at every point, 1 it is not, 2 not all could be measured, or a run without rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.console import Console

from piper_hpc.report.load import UsageError, open_run
from piper_hpc.report.units import seconds
from piper_hpc.runs import RecordError, RunFolder, understood
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.jobs import ask, completed, prepared
from piper_hpc.studies.shared_overlap.resident import ALGORITHMS, OPERATOR, Asked, Point, Row, work
from piper_hpc.studies.tables import markdown_table, table
from piper_hpc.studies.testbed import TestbedError, brought_up

RUN = ("cluster=testbed", "cluster.time_min=30", "cluster.calibration=off", "parallelism=pp2_ep4")
"""Of the configuration of a run: its layers are of the study's own."""
FLAGS = ("--nodes", "4", "--ranks-per-node", "2")
BAR = 0.5
"""Share that is hidden, at least, of what can be."""
COLUMNS = ("all-to-all", "shared", "without", "with", "hidden", "waiting", "shared alone", "share hidden")


@dataclass(frozen=True)
class Found:
    """Medians over repeats of one point."""

    point: Point
    row: Row
    hidden_s: float

    @property
    def share(self) -> float:
        """Of what can be hidden: waiting, or the shared expert where that is less."""
        return self.hidden_s / max(1e-9, min(self.row.wait_s, self.row.shared_s))

    @property
    def cells(self) -> tuple[str, ...]:
        """In the order of COLUMNS."""
        row = self.row
        times = (row.off_s, row.on_s, self.hidden_s, row.wait_s, row.shared_s)
        return (self.point.algorithm, str(self.point.width), *map(seconds, times), f"{self.share:.2f}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("shared_overlap", __doc__)
    parser.add_argument("--show", metavar="RUN", help="a run that was measured before: its folder, or its id")
    parser.add_argument("--as-it-is", action="store_true", help="on the testbed that is up")
    parser.add_argument("--repeats", type=int, default=15, help="of each point (default 15)")
    parser.add_argument("--only", action="append", choices=ALGORITHMS, help="this all-to-all; repeatable")
    parser.add_argument("overrides", nargs="*", help="of the run's configuration, as the launcher takes them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.show is not None:
            run = open_run(chosen.show)
            with understood(run):
                return show(run)
        if chosen.repeats < 1:
            raise UsageError(f"--repeats {chosen.repeats}: must be at least 1, for example --repeats 15")
        with brought_up(() if chosen.as_it_is else FLAGS):
            run = prepared([*RUN, *chosen.overrides])
            ask(run, Asked(chosen.repeats, tuple(chosen.only or ALGORITHMS)))
            print(f"run {run.path}", flush=True)
            completed(run, work)
        return show(run)
    except (UsageError, RecordError, TestbedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER


def show(run: RunFolder) -> int:
    """Print what a run measured and write its report. Raises UsageError for a run without the rows."""
    found = found_of(run.measurements())
    if not found:
        raise UsageError(f"RUN={run.path}: has no rows of this study; make one with the same command without --show")
    cells = [each.cells for each in found]
    least = min(each.share for each in found)
    verdict = f"at least {least:.2f} is hidden of what can be, asked {BAR:g}: {'met' if least >= BAR else 'MISSED'}"
    run.write_report("report.md", "\n".join([markdown_table(COLUMNS, cells), verdict, ""]))
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table(COLUMNS, cells), "")
    console.print(verdict, highlight=False)
    return MET if least >= BAR else MISSED


def found_of(rows: Sequence[dict[str, Any]]) -> list[Found]:
    """The points of a run, in the order in which they were measured. What is hidden is taken pair by pair."""
    by_point: dict[Point, list[Row]] = {}
    for row in rows:
        if row["operator"] == OPERATOR:
            names = Row.__dataclass_fields__
            by_point.setdefault(Point(**row["point"]), []).append(Row(**{name: row[name] for name in names}))
    return [
        Found(
            point,
            Row(*(median(getattr(each, name) for each in taken) for name in Row.__dataclass_fields__)),
            median(each.off_s - each.on_s for each in taken),
        )
        for point, taken in by_point.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
