"""The all-to-all benchmark on the testbed (needs root), as `make bench-a2a`: measure, judge, and write the report.

    python -m piper_hpc.studies.all_to_all
    python -m piper_hpc.studies.all_to_all --show RUN

Exit codes: 0 measured and no bar missed (the last line counts those that were not judged), 1 a bar missed, 2 not all
could be measured, or a run without the benchmark's rows.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType

from rich.console import Console

from piper_hpc.report.load import UsageError, open_run
from piper_hpc.runs import RecordError, RunFolder, understood
from piper_hpc.studies.all_to_all import report
from piper_hpc.studies.all_to_all.measure import BenchError, measure
from piper_hpc.studies.all_to_all.rows import cells, machines
from piper_hpc.studies.all_to_all.show import machine_tables, verdict_counts, verdict_table
from piper_hpc.studies.all_to_all.stages import smoke, stages
from piper_hpc.studies.all_to_all.verdicts import verdicts
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("all_to_all", __doc__)
    parser.add_argument("--show", metavar="RUN", help="judge a run that was measured before: its folder, or its id")
    parser.add_argument("--json", action="store_true", help="print the verdicts as one JSON document")
    parser.add_argument("--runs", default="runs", help="folder of runs (default: runs)")
    parser.add_argument("--only", metavar="MACHINE", action="append", help="measure this machine alone, e.g. 4x2")
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="of the time that each part gets (default 1); a cell has six iterations at least",
    )
    parser.add_argument("--smoke", action="store_true", help="one small cell, to see that it runs")
    chosen = parser.parse_args(arguments)
    if chosen.show is not None:
        try:
            run = open_run(chosen.show, chosen.runs)
            with understood(run):
                return show(run, as_json=chosen.json)
        except (UsageError, RecordError) as error:
            print(f"error: {error}", file=sys.stderr)
            return NO_ANSWER
    planned = smoke() if chosen.smoke else stages(chosen.scale)
    wanted = [stage for stage in planned if not chosen.only or stage.name in chosen.only]
    if not wanted or chosen.scale <= 0:
        names = ", ".join(repr(stage.name) for stage in planned)
        print(f"error: --only {chosen.only} --scale {chosen.scale}: machines are {names}, scale above 0, for example "
              f"--only {planned[0].name} --scale 1", file=sys.stderr)  # fmt: skip
        return NO_ANSWER
    signal.signal(signal.SIGTERM, _interrupt)  # the testbed is taken down on the way out
    run = RunFolder.create(chosen.runs)
    complete = False
    try:
        measure(run, wanted)
        complete = True
    except BenchError as error:
        print(f"error: not all was measured: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {run.path}", file=sys.stderr)
    judged = show(run, as_json=chosen.json)
    return judged if complete else NO_ANSWER


def show(run: RunFolder, *, as_json: bool) -> int:
    """Judge what a run measured, write its report, and print both; returns the exit code."""
    measured = cells(run.measurements())
    if not measured:
        print(f"error: RUN={run.path}: has no row of the benchmark; make one with: make bench-a2a", file=sys.stderr)
        return NO_ANSWER
    found = verdicts(measured)
    written = report.write(run)
    if as_json:
        print(json.dumps({"schema_version": 1, "run": run.run_id, "verdicts": [asdict(each) for each in found]}))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=220)
        for machine in machines(measured):
            for table in machine_tables(machine, [cell for cell in measured if cell.machine == machine]):
                console.print(table, "")
        console.print(verdict_table(found), "")
        console.print(f"bars      {verdict_counts(found)}", highlight=False)
        console.print(f"report    {written[0]}", highlight=False)
    return MISSED if any(verdict.met is False for verdict in found) else MET


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
