"""How far the model is from what is known: `exact` arithmetic, own `runs` term by term, others' `published` rows.

python -m analysis.validate exact
python -m analysis.validate runs RUN...
python -m analysis.validate published --rows FILE.csv
python -m analysis.validate replay RUN...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from rich.console import Console

from analysis.validation import replay
from analysis.validation.exact import command as exact
from analysis.validation.published import command as published
from piper_hpc.report.facts import NOT_TIMED
from piper_hpc.report.load import UsageError, comparable, metrics, open_run, steady
from piper_hpc.report.table import MeasuredRouting, Row, predicted_against_measured, render, with_measured_routing
from piper_hpc.report.units import percent, seconds
from piper_hpc.runs import RecordError, RunFolder
from piper_hpc.spec import TERMS

SCHEMA_VERSION = 1
OK, FAILED, USAGE = 0, 1, 2


@dataclass(frozen=True)
class Comparison:
    """One run against its prediction."""

    run: RunFolder
    rows: list[Row]
    steps: int
    steady_steps: int
    routed: MeasuredRouting | None = None

    @staticmethod
    def of(run: RunFolder) -> Comparison:
        """Read a run. Raises UsageError for one without steps or without a prediction, or whose record lacks keys."""
        try:
            found = Comparison._read(run)
            found.document()  # a key that it lacks is missed here, not while others are printed
            return found
        except (RecordError, AttributeError, LookupError, TypeError, ValueError) as error:  # written by something else
            reason = error.reason if isinstance(error, RecordError) else f"{type(error).__name__}: {error}"
            raise UsageError(f"RUN={run.path}: its record cannot be read ({reason}); use another run") from error

    @staticmethod
    def _read(run: RunFolder) -> Comparison:
        taken = metrics(run)
        if run.prediction() is None:
            raise UsageError(
                f"RUN={run.path}: must have a prediction, but prediction.json is missing; measure the cluster "
                "first with: python -m piper_hpc.launch task=microbench, then train"
            )
        routed = with_measured_routing(run)
        return Comparison(run, predicted_against_measured(run), len(taken), len(steady(taken)), routed)

    @property
    def step_time_error_pct(self) -> float:
        """100 (predicted - measured) / measured of the step time."""
        (error,) = (row.error_pct for row in self.rows if row.key == "step_time_s")
        assert error is not None, "a step takes time, and it is predicted"
        return error

    @property
    def terms_error_pct(self) -> float | None:
        """Absolute errors of all terms, summed, over the measured step: unlike the step's own, none cancels another.

        None of a run whose steps were not timed by term.
        """
        step_time_s = next(row.measured for row in self.rows if row.key == "step_time_s")
        terms = [row for row in self.rows if row.key in TERMS and row.predicted is not None]
        if not terms:
            return None
        return 100 * sum(abs((row.predicted or 0.0) - row.measured) for row in terms) / step_time_s

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        prediction = self.run.prediction() or {}
        return {
            "run_id": self.run.run_id,
            "path": str(self.run.path),
            "layout": prediction["layout"],
            "calibration": prediction["calibration"].get("source"),
            "steps": {"all": self.steps, "steady": self.steady_steps},
            "rows": [asdict(row) for row in self.rows],
            "step_time_error_pct": self.step_time_error_pct,
            "terms_error_pct": self.terms_error_pct,
            "measured_routing": None if self.routed is None else _routing(self.routed),
        }


def _routing(routed: MeasuredRouting) -> dict[str, Any]:
    """As plain JSON types, with the words of the record, where imbalance is called skew."""
    rows = [asdict(row) for row in routed.rows]
    return {"skew": routed.imbalance, "memory_skew": routed.memory_imbalance, "rows": rows}


def _all() -> list[Comparison]:
    """Every run under runs/ that can be compared; what cannot be read is skipped with a line on stderr."""
    runs, skipped = comparable()
    found = []
    for run in runs:
        try:
            found.append(Comparison.of(run))
        except UsageError as error:
            skipped.append(str(error))
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    if not found:
        raise UsageError("runs/ holds no run whose record can be read; make one with: python -m piper_hpc.launch")
    return found


def summary(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Over all runs: absolute errors of step time and memory, and how many measured values the intervals cover."""
    by_terms = [each.terms_error_pct for each in comparisons if each.terms_error_pct is not None]
    judged = [row for each in comparisons for row in each.rows if row.covered is not None]
    return {
        "runs": len(comparisons),
        "step_time": _absolute([each.step_time_error_pct for each in comparisons]),
        "peak_memory": _absolute(
            [row.error_pct for each in comparisons for row in each.rows if row.key == "peak_memory_bytes"]
        ),
        "terms_error_pct": fmean(by_terms) if by_terms else None,
        "interval_level": 0.9,
        "intervals": len(judged),
        "coverage": fmean(bool(row.covered) for row in judged) if judged else None,
    }


def _absolute(errors_pct: Sequence[float | None]) -> dict[str, float | int]:
    """n, mean, median and maximum of absolute errors in percent."""
    sizes = [abs(error) for error in errors_pct if error is not None]
    if not sizes:
        return {"n": 0}
    return {
        "n": len(sizes),
        "mean_abs_error_pct": fmean(sizes),
        "median_abs_error_pct": median(sizes),
        "max_abs_error_pct": max(sizes),
    }


def document(comparisons: Sequence[Comparison], tolerance_pct: float | None) -> dict[str, Any]:
    """The answer to `--json`; `passed` is null where no tolerance was given."""
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [each.document() for each in comparisons],
        "summary": summary(comparisons),
        "tolerance_pct": tolerance_pct,
        "passed": None if tolerance_pct is None else not _beyond(comparisons, tolerance_pct),
    }


def _beyond(comparisons: Sequence[Comparison], tolerance_pct: float) -> list[Comparison]:
    return [each for each in comparisons if abs(each.step_time_error_pct) > tolerance_pct]


def _print(comparisons: Sequence[Comparison], tolerance_pct: float | None, console: Console) -> None:
    for each in comparisons:
        title = f"{each.run.run_id}: median of {each.steady_steps} of {each.steps} steps"
        console.print(render(each.rows, title))
        if each.routed is not None:
            console.print(each.routed.line, highlight=False)
        known = each.terms_error_pct is not None
        said = f"errors of all terms, none cancelling: {each.terms_error_pct:.1f} % of the step" if known else NOT_TIMED
        console.print(f"{said}\n", highlight=False)
    found = summary(comparisons)
    coverage = found["coverage"]
    console.print(
        f"{len(comparisons)} run(s): step time off by {found['step_time']['mean_abs_error_pct']:.1f} % on average, "
        f"{found['step_time']['max_abs_error_pct']:.1f} % at most; "
        + ("no intervals" if coverage is None else f"90 % intervals cover {100 * coverage:.0f} % of values"),
        highlight=False,
    )
    if tolerance_pct is None:
        return
    for each in comparisons:
        failed = abs(each.step_time_error_pct) > tolerance_pct
        step = next(row for row in each.rows if row.key == "step_time_s")
        console.print(
            f"{'[ FAIL ]' if failed else '[  OK  ]'} {each.run.run_id}: step time "
            f"{seconds(step.predicted or 0.0)} predicted, {seconds(step.measured)} measured: "
            f"{percent(each.step_time_error_pct)} (tolerance {tolerance_pct:g} %)",
            markup=False,
            highlight=False,
        )


def _tolerance(text: str) -> float:
    value = float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a percentage of 0 or more, for example 15")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit code 0 for ok, 1 for a run beyond the tolerance or a case that fails, 2 for no answer."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.validate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("runs", help="compare runs with their own predictions")
    runs.add_argument(
        "runs", nargs="*", metavar="RUN", help="a run's folder, or its id under runs/ (default: all there that can be)"
    )
    runs.add_argument("--json", action="store_true", help="print one JSON document")
    runs.add_argument(
        "--tolerance", type=_tolerance, metavar="PCT", help="exit with 1 where a step time is further off than this"
    )
    published.add(commands, _tolerance)
    exact.add(commands)
    replayed = commands.add_parser("replay", help="put a profiled run's own passes through the schedule model")
    replayed.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run of task=profile, or its id")
    replayed.add_argument("--json", action="store_true", help="print one JSON document")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "published":
            return OK if published.run(chosen) else FAILED
        if chosen.command == "exact":
            return OK if exact.run(chosen) else FAILED
        if chosen.command == "replay":
            replay.run(chosen.runs, as_json=chosen.json)
            return OK
        comparisons = [Comparison.of(open_run(name)) for name in chosen.runs] or _all()
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    if chosen.json:
        print(json.dumps(document(comparisons, chosen.tolerance), indent=2))
    else:
        _print(comparisons, chosen.tolerance, Console())
    return FAILED if chosen.tolerance is not None and _beyond(comparisons, chosen.tolerance) else OK


if __name__ == "__main__":
    sys.exit(main())
