"""`python -m analysis.report RUN`: write report.html (offline, one file) and report.md again, beside a run's record."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from piper_hpc.report.load import UsageError, open_run
from piper_hpc.report.write import write
from piper_hpc.runs import RecordError, understood
from piper_hpc.studies.all_to_all import report as all_to_all


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 2 for a run that has nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its id under runs/")
    parser.add_argument("--json", action="store_true", help="print the paths as one JSON document")
    chosen = parser.parse_args(arguments)
    try:
        run = open_run(chosen.run)
        with understood(run):
            of_study = not run.metrics() and all_to_all.sections(run)
            written = all_to_all.write(run) if of_study else write(run)
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps({"written": [str(path) for path in written]}))
    else:
        print("\n".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
