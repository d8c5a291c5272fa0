"""What expert migration brings: planners replayed on loads, or training with and without it in turn.

    python -m piper_hpc.studies.migration                      planners on W1, W2, W6, W7, priced for Frontier
    python -m piper_hpc.studies.migration --recorded RUN       on the router of a run with train.routing.record=true
    python -m piper_hpc.studies.migration --measure [key=value ...]     trains, here or where cluster=... says

Exit codes: 0 done and no bar missed, 1 a bar missed, 2 a mistake in what was asked, or a run that failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from rich.console import Console

from piper_hpc.config.model import model_spec
from piper_hpc.config.model import preset as model_preset
from piper_hpc.config.schema import ModelConfig
from piper_hpc.paths import data_folder
from piper_hpc.report.load import UsageError, open_run
from piper_hpc.runs import RecordError, understood
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.jobs import completed, prepared
from piper_hpc.studies.migration.paired import work
from piper_hpc.studies.migration.replay import Loads, made, prices, replay
from piper_hpc.studies.migration.show import Measured, measured, measured_table, replay_table

Made = TypeVar("Made")
LOADS = ("W1", "W2", "W6", "W7")
ROUTER = "router"
"""The run's own."""
MEASURED = (
    *("train=minute", "train.steps=48", "parallelism.pp=1", "parallelism.ep=4", "model.experts=32"),
    *("parallelism.migration=auto", "parallelism.migration_every=4"),
)
"""Eight experts on each of four ranks, and moves that have time to pay."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("migration", __doc__)
    parser.add_argument("--recorded", metavar="RUN", help="replay a run's router: its folder, or its id")
    parser.add_argument("--measure", action="store_true", help="train with and without migration, step by step in turn")
    parser.add_argument("--loads", default=None, help=f"of the measurement, default {','.join((*LOADS, ROUTER))}")
    parser.add_argument("--model", default="olmoe", help="of the replay, a preset of conf/model (default olmoe)")
    parser.add_argument("--ep", type=int, default=8, help="ranks of an expert group of the replay (default 8)")
    parser.add_argument("--site", default="frontier", help="of the replay's prices, a preset of conf/cluster")
    parser.add_argument("overrides", nargs="*", help="of the measurement's configuration, as the launcher takes them")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.measure:
            return _measure((chosen.loads or ",".join((*LOADS, ROUTER))).split(","), chosen.overrides)
        return _replay(chosen.model, chosen.ep, chosen.site, chosen.recorded)
    except (UsageError, RecordError) as error:
        print(f"error: {error}", file=sys.stderr)
        return NO_ANSWER


def _replay(name: str, ep: int, site: str, recorded: str | None) -> int:
    model, loads = _known("model", name, model_preset), None
    if recorded is not None:
        run = open_run(recorded)
        with understood(run):
            loads, config = run.routed(), run.config()
        if loads is None:
            works = "a run with train.routing.record=true"
            raise UsageError(f"--recorded {recorded}: has kept no counts of its router; use {works}")
        with understood(run):
            model, ep = model_spec(ModelConfig(**config["model"])), config["parallelism"]["ep"]
    if ep < 2 or model.experts % ep:
        raise UsageError(f"--ep {ep}: must divide the {model.experts} experts of {name}, and be above 1, as --ep 8 is")
    given = _known("cluster", site, lambda known: prices(known, model, ep))
    by_load: dict[str, Loads] = {load: made(load, model, ep) for load in LOADS} if loads is None else {ROUTER: loads}
    found = [each for load, counts in by_load.items() for each in replay(load, counts, model, given)]
    title = f"{model.name}, {model.experts} experts on {ep} ranks, prices of {site}: busiest rank over the mean"
    _console().print(replay_table(found, title))
    return MET


def _known(group: str, name: str, read: Callable[[str], Made]) -> Made:
    """What `read` makes of the option `name` of conf/GROUP. Raises UsageError where there is none."""
    options = sorted(path.stem for path in (data_folder("conf") / group).glob("*.yaml"))
    if name not in options:
        raise UsageError(f"{name}: conf/{group} has no such option; use one of {', '.join(options)}")
    return read(name)


def _measure(loads: Sequence[str], overrides: Sequence[str]) -> int:
    found: list[Measured] = []
    for load in loads:
        routing = [] if load == ROUTER else [f"train.routing.workload={load}"]
        run = completed(prepared([*MEASURED, *routing, *overrides]), work)
        found.append(measured(load, run.measurements()))
        print(f"{load}: {run.path}", file=sys.stderr)
    _console().print(measured_table(found))
    return MISSED if any(each.missed for each in found) else MET


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=160)


if __name__ == "__main__":
    sys.exit(main())
