"""`python -m analysis.bench_a2a RUN`: the tables of the all-to-all benchmark, and the run's reports.

Exit codes: 0 no bar missed (the last line counts those that were not judged), 1 one missed, 2 a run without the
benchmark's rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from analysis import report
from analysis.bench_a2a.rows import cells, machines
from analysis.bench_a2a.show import counted, machine_tables, verdict_table
from analysis.bench_a2a.verdicts import verdicts
from analysis.load import UsageError, open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m analysis.bench_a2a", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its id under runs/")
    parser.add_argument("--json", action="store_true", help="print the verdicts as one JSON document")
    chosen = parser.parse_args(arguments)
    try:
        run = open_run(chosen.run)
        measured = cells(run.measurements())
        if not measured:
            raise UsageError(f"RUN={chosen.run}: has no row of the benchmark; make one with: make bench-a2a")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = verdicts(measured)
    written = report.write(run)
    if chosen.json:
        print(json.dumps({"schema_version": 1, "run": run.run_id, "verdicts": [asdict(each) for each in found]}))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=220)
        for machine in machines(measured):
            for table in machine_tables(machine, [cell for cell in measured if cell.machine == machine]):
                console.print(table, "")
        console.print(verdict_table(found), "")
        console.print(f"bars      {counted(found)}", highlight=False)
        console.print(f"report    {written[0]}", highlight=False)
    return 1 if any(verdict.met is False for verdict in found) else 0


if __name__ == "__main__":
    sys.exit(main())
