"""`python -m piper_hpc.jobs sync [RUN ...]`: show records in wandb, from where the network is."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from piper_hpc.cli.replay import Replayed, ReplayError, Target, replay
from piper_hpc.cli.sweep import runs_of
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report import write as report
from piper_hpc.runs import RecordError, RunFolder, find, understood
from piper_hpc.submit.outcome import observe, observe_all

PROJECT = "piper_hpc"
"""Where a run is shown whose configuration names no project."""


def register(commands: Any, shared: argparse.ArgumentParser, pick: Callable[[Path, str], RunFolder]) -> None:
    """Add the command to those of `jobs`. pick: the run that a word names under a folder of runs."""
    command = commands.add_parser("sync", parents=[shared], help=sync.__doc__, description=sync.__doc__)
    command.set_defaults(action=lambda arguments, console: sync(arguments, console, pick))
    what = "runs (id, its beginning or end, a path, `latest`) or names of sweeps; default: all runs that have ended"
    command.add_argument("names", nargs="*", metavar="RUN|SWEEP", help=what)
    command.add_argument("--project", help="of wandb (default: the run's tracking.project)")
    command.add_argument("--entity", help="of wandb, the team (default: the run's tracking.entity)")
    later = "write wandb's files into the run's folder, for `wandb sync`; also with WANDB_MODE=offline"
    command.add_argument("--offline", action="store_true", help=later)


def sync(arguments: argparse.Namespace, console: Console, pick: Callable[[Path, str], RunFolder]) -> int:
    """Show runs in wandb: what it does not have of them yet. Exit code 1 where a run could not be shown."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode not in ("online", "offline"):
        raise ConfigError(Problem("WANDB_MODE", mode, "sends nothing", "WANDB_MODE=online, or jobs sync --offline"))
    if find_spec("wandb") is None:
        raise ConfigError(Problem("wandb", "not installed", "is what shows the runs", "pip install wandb"))
    found = find(arguments.runs)
    runs = _named(arguments, found, pick) if arguments.names else found
    offline = arguments.offline or mode == "offline"
    results = _replay_all(runs, arguments, offline=offline, only_ended=not arguments.names)
    if arguments.json:
        print(json.dumps({"runs": [asdict(result) for result in results]}, indent=2))
    else:
        _tell(results, arguments.names, console)
    return 1 if any(result.problem for result in results) else 0


def _named(
    arguments: argparse.Namespace, found: Sequence[RunFolder], pick: Callable[[Path, str], RunFolder]
) -> list[RunFolder]:
    """Runs and the runs of sweeps, each once, in the order they were named in."""
    named: dict[Path, RunFolder] = {}
    for name in arguments.names:
        for run in runs_of(found, name) or [pick(arguments.runs, name)]:
            named[run.path] = run
    return list(named.values())


def _replay_all(
    runs: Sequence[RunFolder], arguments: argparse.Namespace, *, offline: bool, only_ended: bool
) -> list[Replayed]:
    """Each run's outcome. A record that cannot be read leaves the others alone; after wandb failed none is tried."""
    jobs, results, stopped = observe_all(runs), [], False
    for run in runs:
        target = Target("offline" if offline else "online", arguments.project or PROJECT, arguments.entity)
        if stopped:
            results.append(Replayed(run.run_id, target, "not_tried", problem="wandb failed before"))
            continue
        try:
            status = observe(run, jobs)
            if only_ended and not status.ended:
                continue
            target = _target(run, arguments, offline)
            with understood(run):
                report.write_missing(run, status.state)
                results.append(replay(run, status, target))
        except RecordError as error:
            results.append(Replayed(run.run_id, target, "failed", problem=error.reason))
        except ReplayError as error:
            results.append(Replayed(run.run_id, target, "failed", problem=str(error)))
            stopped = True
        except OSError as error:  # somebody else's folder
            results.append(Replayed(run.run_id, target, "failed", problem=str(error)))
    return results


def _target(run: RunFolder, arguments: argparse.Namespace, offline: bool) -> Target:
    chosen: Any = run.config().get("tracking") if (run.path / "config.yaml").exists() else {}
    chosen = chosen if isinstance(chosen, Mapping) else {}
    project = arguments.project or chosen.get("project") or PROJECT
    return Target("offline" if offline else "online", project, arguments.entity or chosen.get("entity"))


def _tell(results: Sequence[Replayed], names: Sequence[str], console: Console) -> None:
    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    shown = [result for result in results if result.state != "no_steps" or names]
    for result in shown:
        if result.problem:
            line(f"{result.run_id}: {result.state.replace('_', ' ')}: {result.problem}", "red")
        elif result.state == "synced":
            line(f"{result.run_id}: {result.steps_added} steps added, {result.url or f'wandb sync {result.folder}'}")
        elif names:
            line(f"{result.run_id}: {'has no step' if result.state == 'no_steps' else 'nothing new'}")
        if result.remark:
            line(f"remark   {result.remark}", "yellow")
    synced, same = (sum(result.state == state for result in results) for state in ("synced", "up_to_date"))
    line(f"{synced} synced, {same} had nothing new")
