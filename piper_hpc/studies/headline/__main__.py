"""Compare strategies on the testbed (needs root), as `make compare-strategies`.

Links keep Frontier's ratio of communication to compute, then are slowed between nodes, until expert parallelism over
all ranks spends three quarters of its step in exchange. A point is a run of its own.

    python -m piper_hpc.studies.headline
    python -m piper_hpc.studies.headline --slowdowns 1,4 --repeats 5
    python -m piper_hpc.studies.headline --as-it-is --only a,d --settings 1
    python -m piper_hpc.studies.headline --show RUN [RUN ...]

Exit codes: 0 all bars met, 1 a bar missed, 2 not all could be measured, or a run without these rows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

from piper_hpc.report.load import UsageError, open_run
from piper_hpc.runs import RecordError, RunFolder, understood
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.headline.judge import REACHED_SHARE, Point, bars, point_of
from piper_hpc.studies.headline.machine import as_it_is, flops_per_s, new_run, slowed
from piper_hpc.studies.headline.picture import picture
from piper_hpc.studies.headline.resident import Asked, work
from piper_hpc.studies.headline.show import markdown, printed
from piper_hpc.studies.headline.strategies import STRATEGIES
from piper_hpc.studies.jobs import ask, completed
from piper_hpc.studies.testbed import TestbedError
from piper_hpc.testbed.faults import Fault

SLOWDOWNS = (1.0, 2.25, 5.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("headline", __doc__)
    parser.add_argument("--show", metavar="RUN", nargs="+", help="judge runs that were measured before")
    parser.add_argument("--slowdowns", metavar="X,Y", help="of the links between nodes, all of them")
    parser.add_argument("--as-it-is", action="store_true", help="on the testbed that is up, at its own links")
    parser.add_argument("--repeats", type=int, default=3, help="of each strategy at each slowdown (default 3)")
    parser.add_argument("--settings", type=int, default=3, help="of each strategy that are tried (default 3)")
    parser.add_argument("--only", metavar="KEYS", help=f"strategies, of {','.join(STRATEGIES)}")
    parser.add_argument("overrides", nargs="*", help="of the runs' configuration, as the launcher takes them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.show:
            return show([open_run(name) for name in chosen.show])
        slowdowns = _numbers(chosen.slowdowns) if chosen.slowdowns else SLOWDOWNS
        keys = tuple(chosen.only.split(",")) if chosen.only else tuple(STRATEGIES)
        if unknown := set(keys) - set(STRATEGIES):
            raise UsageError(f"--only {','.join(unknown)}: must be of {','.join(STRATEGIES)}, for example --only a,d")
        for name in ("repeats", "settings"):
            if (value := getattr(chosen, name)) < 1:
                raise UsageError(f"--{name} {value}: must be at least 1, for example --{name} 3")
        asked = Asked(1.0, 0.0, 0.0, chosen.repeats, chosen.settings, keys)
        if chosen.as_it_is:
            with as_it_is() as links:
                runs = [_measured(replace(asked, **asdict(links)), chosen.overrides)]
        else:
            runs = _slowed(asked, slowdowns, chosen.overrides, whole=chosen.slowdowns is not None)
    except (UsageError, RecordError, TestbedError, Fault) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER
    return show(runs)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        found = tuple(sorted(map(float, text.split(","))))
    except ValueError:
        found = (0.0,)
    if min(found) <= 0:
        raise UsageError(f"--slowdowns {text}: must be numbers above 0, for example --slowdowns 1,2")
    return found


def _slowed(asked: Asked, slowdowns: Sequence[float], overrides: Sequence[str], *, whole: bool) -> list[RunFolder]:
    """A run for each slowdown, on a testbed of its own; whole: also beyond the share of exchange that is looked for."""
    reached, runs = flops_per_s(), []
    for slowdown in slowdowns:
        with slowed(slowdown, reached) as links:
            runs.append(_measured(replace(asked, slowdown=slowdown, **asdict(links)), overrides))
        point = point_of(runs[-1])
        if not whole and point is not None and (point.share or 0.0) >= REACHED_SHARE:
            break
    return runs


def _measured(asked: Asked, overrides: Sequence[str]) -> RunFolder:
    """A run on the testbed that is up. Raises UsageError where it fails."""
    run = new_run(overrides)
    ask(run, asked)
    print(f"links / {asked.slowdown:g}: run {run.path}", flush=True)
    return completed(run, work)


def show(runs: Sequence[RunFolder]) -> int:
    """Judge what runs measured, write report and picture into the last one's folder, and print the tables. Raises
    UsageError for a run without the rows."""
    points: list[Point] = []
    for run in runs:
        with understood(run):
            point = point_of(run)
        if point is None:
            raise UsageError(f"RUN={run.path}: compares nothing; make one with: make compare-strategies")
        points.append(point)
    points.sort(key=lambda point: point.slowdown)
    judged = bars(points)
    runs[-1].write_report("report.md", markdown(points, judged))
    runs[-1].write_report("headline.svg", picture(points))
    printed(points, judged)
    print(f"report {runs[-1].path / 'report.md'}")
    return MISSED if any(not bar.met for bar in judged) else MET


if __name__ == "__main__":
    sys.exit(main())
