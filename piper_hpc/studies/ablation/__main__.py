"""What each part brings, on the testbed (needs root), as `make ablation`.

Links are those of `make compare-strategies`, slowed between nodes by --slowdown.

    python -m piper_hpc.studies.ablation
    python -m piper_hpc.studies.ablation --only EP8 --repeats 1
    python -m piper_hpc.studies.ablation --show RUN

Exit codes: 0 all variants have the same losses, 1 they have not, 2 not all could be measured, or a run without rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from piper_hpc.report.load import UsageError, open_run
from piper_hpc.runs import RecordError, RunFolder, understood
from piper_hpc.studies.ablation.resident import Asked, work
from piper_hpc.studies.ablation.show import GAIN_COLUMNS, LOSS, STEP_COLUMNS, Measured, gain_cells, step_cells
from piper_hpc.studies.ablation.variants import variants
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.headline.machine import as_it_is, flops_per_s, new_run, slowed
from piper_hpc.studies.jobs import ask, completed
from piper_hpc.studies.tables import markdown_table, table
from piper_hpc.studies.testbed import TestbedError
from piper_hpc.testbed.faults import Fault


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("ablation", __doc__)
    parser.add_argument("--show", metavar="RUN", help="a run that was measured before: its folder, or its id")
    parser.add_argument("--slowdown", type=float, default=2.0, help="of the links between nodes (default 2)")
    parser.add_argument("--as-it-is", action="store_true", help="on the testbed that is up, at its own links")
    parser.add_argument("--repeats", type=int, default=3, help="of each variant (default 3)")
    parser.add_argument("--only", metavar="WORDS", help="variants that have these words, e.g. 'EP8 HALO'")
    parser.add_argument("overrides", nargs="*", help="of the run's configuration, as the launcher takes them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.show is not None:
            run = open_run(chosen.show)
            with understood(run):
                return show(run)
        names = tuple(
            each.name
            for each in variants()
            if chosen.only is None or set(chosen.only.split()) <= set(each.name.split())
        )
        if not names or chosen.repeats < 1 or chosen.slowdown <= 0:
            asked = f"--only {chosen.only} --repeats {chosen.repeats} --slowdown {chosen.slowdown}"
            raise UsageError(f"{asked}: leave nothing to measure; use --only EP8 --repeats 1 --slowdown 2")
        with as_it_is() if chosen.as_it_is else slowed(chosen.slowdown, flops_per_s()):
            run = _measured(names, chosen.repeats, chosen.overrides)
        return show(run)
    except (UsageError, RecordError, TestbedError, Fault) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER


def _measured(names: tuple[str, ...], repeats: int, overrides: Sequence[str]) -> RunFolder:
    """A run on the testbed that is up. Raises UsageError where it fails."""
    run = new_run(overrides)
    ask(run, Asked(names, repeats))
    print(f"run {run.path}", flush=True)
    return completed(run, work)


def show(run: RunFolder) -> int:
    """Print what a run measured and write its report. Raises UsageError for a run without the rows."""
    measured = Measured(run.measurements())
    if not measured.variants:
        raise UsageError(f"RUN={run.path}: has no variant of the ablation; make one with: make ablation")
    tables = (GAIN_COLUMNS, gain_cells(measured)), (STEP_COLUMNS, step_cells(measured))
    differ = measured.losses_differ()
    losses = f"losses differ by {differ:.1e} at most, asked {LOSS:g}: {'met' if differ <= LOSS else 'MISSED'}"
    run.write_report("report.md", "\n".join([*(markdown_table(*each) for each in tables), losses, ""]))
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for columns, rows in tables:
        console.print(table(columns, rows), "")
    console.print(losses)
    return MET if differ <= LOSS else MISSED


if __name__ == "__main__":
    sys.exit(main())
