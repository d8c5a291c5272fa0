"""Our own runs on the testbed (needs root), as `make validate-testbed`: calibrate, predict, train, and judge.

    python -m piper_hpc.studies.own_runs
    python -m piper_hpc.studies.own_runs --resume RUN      what an interrupted one has not measured yet
    python -m piper_hpc.studies.own_runs --show RUN
    python -m piper_hpc.studies.own_runs --show RUN --calibration FILE      predicted again, by the model as it is now

Exit codes: 0 all bars met, 1 a bar missed, 2 not all could be measured, or a run without these rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from piper_hpc.cluster.calibration import CalibrationError
from piper_hpc.report.load import UsageError, open_run
from piper_hpc.runs import RecordError, RunFolder, understood
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.jobs import ask, finished, prepared
from piper_hpc.studies.own_runs.judge import bars, results
from piper_hpc.studies.own_runs.points import POINTS, Asked
from piper_hpc.studies.own_runs.predicting import predicted_again
from piper_hpc.studies.own_runs.show import BAR_COLUMNS, COLUMNS, bar_cells, cells, markdown
from piper_hpc.studies.tables import table
from piper_hpc.studies.testbed import TestbedError, brought_up

RUN = (
    *("cluster=testbed", "cluster.time_min=60", "parallelism=pp2_ep4", "train.routing.workload=W0"),
    "task.budget_s=120",  # whole curves of the slowest exchanges: short ones of eight ranks say nothing of long ones
    *("task.suites=[calibration,dispatch]", "task.cell_s=0.6"),  # the family too, which links alone do not price
)
"""Of the configuration of the run: the points have models, layouts and batches of their own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("own_runs", __doc__)
    parser.add_argument("--show", metavar="RUN", help="judge a run that was measured before: its folder, or its id")
    parser.add_argument("--calibration", metavar="FILE", type=Path, help="with --show: predict the points again by it")
    parser.add_argument("--resume", metavar="RUN", help="measure what is missing of a run")
    parser.add_argument(
        "--only", metavar="WORDS", action="append", help="points that have these words, e.g. 'narrow pp2'"
    )
    parser.add_argument("--repeats", type=int, default=Asked.repeats, help=f"of each point (default {Asked.repeats})")
    parser.add_argument("overrides", nargs="*", help="of the run's configuration, as the launcher takes them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.calibration is not None and chosen.show is None:
            raise UsageError(f"--calibration {chosen.calibration}: goes with --show RUN alone, which it predicts again")
        if chosen.show is not None:
            run = open_run(chosen.show)
            with understood(run):
                again = chosen.calibration is not None
                return show(run, predicted_again(run, chosen.calibration) if again else None)
        with brought_up():
            from piper_hpc.studies.own_runs.resident import work

            run = (
                open_run(chosen.resume)
                if chosen.resume is not None
                else _new(chosen.only, chosen.repeats, chosen.overrides)
            )
            print(f"run {run.path}", flush=True)
            status = finished(run, work)
        judged = show(run)
    except (UsageError, RecordError, TestbedError, CalibrationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER
    if status.state != "completed":
        print(f"error: not all was measured: {status.state}: {status.reason}; go on with --resume {run.path}",
              file=sys.stderr)  # fmt: skip
        return NO_ANSWER
    return judged


def _new(only: Sequence[str] | None, repeats: int, overrides: Sequence[str]) -> RunFolder:
    """A run that has been told what to measure. Raises UsageError where that is nothing."""
    names = tuple(
        point.name
        for point in POINTS
        if not only or any(set(words.split()) <= set(point.name.split()) for words in only)
    )
    if not names or repeats < 1:
        works = "--only 'narrow pp2' --repeats 1"
        raise UsageError(f"--only {only} --repeats {repeats}: must leave a point, and one repeat of it, as {works}")
    run = prepared([*RUN, *overrides])
    ask(run, Asked(names, repeats))
    return run


def show(run: RunFolder, rows: Sequence[dict[str, Any]] | None = None) -> int:
    """Judge what a run measured, write its report, and print both. rows: in place of the run's own. Raises UsageError
    for a run without the rows."""
    found = results(run.measurements() if rows is None else rows)
    if not found:
        raise UsageError(f"RUN={run.path}: has no point of the study; make one with: make validate-testbed")
    judged = bars(found)
    run.write_report("report.md", markdown(found, judged))
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table(COLUMNS, [*map(cells, found)]), "", table(BAR_COLUMNS, [*map(bar_cells, judged)]))
    return MISSED if any(bar.met is False for bar in judged) else MET


if __name__ == "__main__":
    sys.exit(main())
