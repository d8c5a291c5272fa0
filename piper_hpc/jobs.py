"""`python -m piper_hpc.jobs {list,status,logs,wait,cancel,resume,sync,dashboard,compare}`: what was submitted, and what
became of it."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from piper_hpc.cli import compare, dashboard, resume, sweep_jobs, sync
from piper_hpc.cli.describe import describe, waiting
from piper_hpc.cli.errors import run_command
from piper_hpc.cli.eta import Eta, span
from piper_hpc.cli.follow import Watch, figures, tell_end
from piper_hpc.cli.logs import ALL, Tails, follow_logs, print_now, whose_log
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report import network
from piper_hpc.report import write as report
from piper_hpc.runs import RecordError, RunFolder, find, understood
from piper_hpc.runs.sweeps import find_sweeps
from piper_hpc.submit.outcome import cancel, observe_all


def pick(runs: Path, name: str) -> RunFolder:
    """A run by id, by the unique beginning or end of its id, by its path, or `latest`. Raises ConfigError."""
    if (Path(name) / "manifest.json").exists():
        return RunFolder(name)
    known = find(runs)
    if name == "latest" and known:
        return known[-1]
    matches = [run for run in known if run.run_id.startswith(name) or run.run_id.endswith(name)]
    if len(matches) == 1:
        return matches[0]
    rule = f"names {len(matches)} of the {len(known)} runs in {runs}"
    works = known[-1].run_id if known else "python -m piper_hpc.launch, to make a first run"
    raise ConfigError(Problem("RUN", name, rule, works))


def list_runs(arguments: argparse.Namespace, console: Console) -> int:
    """All runs, newest last."""
    runs = find(arguments.runs)
    jobs = observe_all(runs)
    documents = [describe(run, jobs) for run in runs]
    if arguments.json:
        print(json.dumps(documents, indent=2))
        return 0
    if not documents:
        console.print(f"no runs in {arguments.runs}; start one with: python -m piper_hpc.launch")
        return 0
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("run", "task", "model", "cluster", "state", "step", "loss", "tokens/s", "ETA"):
        # Where the terminal is narrow, words are folded; ids and figures stay whole.
        is_word = name in ("task", "model", "cluster", "state")
        justify: Any = "right" if name in ("step", "loss", "tokens/s") else "left"
        table.add_column(name, no_wrap=not is_word, overflow="fold", justify=justify)
    for document in documents:
        table.add_row(*(escape(str(word)) if word is not None else "" for word in _cells(document)))
    console.print(table)
    for sweep in find_sweeps(arguments.runs):
        with suppress(RecordError):  # jobs status says what is wrong with it
            console.print(f"sweep {sweep.name}: {len(sweep.points())} points", highlight=False)
    for document in documents:
        if document["problem"]:
            console.print(f"{document['run_id']}: {document['problem']}", highlight=False, markup=False)
    return 0


def _cells(document: dict[str, Any]) -> tuple[Any, ...]:
    """A run's row of the list."""
    status, last = document["status"], document["last"]
    why = status["failure_class"] or document["queue"]["reason"]
    state = (status["state"] or "") + (f" ({why})" if why else "")
    step = f"{document['steps_done']}/{document['steps']}" if last else ""
    loss = f"{last['loss']:.3f}" if last and isinstance(last["loss"], float) else ""
    rate = f"{last['tokens_per_s']:,.0f}" if last and isinstance(last["tokens_per_s"], (int, float)) else ""
    names = (document["run_id"], document["task"], document["model"], document["cluster"])
    return (*names, state, step, loss, rate, _eta(document))


def _eta(document: dict[str, Any]) -> str:
    """When a run ends, with a tilde where that is predicted; empty where it is not known."""
    return "" if document["eta_s"] is None else str(Eta(document["eta_s"], document["eta_from"]))


def show_status(arguments: argparse.Namespace, console: Console) -> int:
    """One run or sweep; writes the report of a completed run whose launcher did not wait for it."""
    if (sweep := sweep_jobs.pick_sweep(arguments.runs, arguments.run)) is not None:
        return sweep_jobs.status(sweep, arguments, console)
    run = pick(arguments.runs, arguments.run)
    document = describe(run)
    whole = document["problem"] is None
    if whole:
        with understood(run):
            report.write_missing(run, document["status"]["state"])
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    status, job = document["status"], document["job"]
    what = f"{document['task']} {document['model']} on {document['cluster']}" if whole else document["task"] or ""
    console.print(f"[bold]{run.run_id}[/]  {escape(what)}", highlight=False)
    if not whole:
        console.print(f"remark   {document['problem']}", highlight=False, markup=False)
    if status["state"]:
        console.print(f"state    {status['state']}, attempt {status['attempt']}", highlight=False)
    if wait := waiting(document["queue"]):
        console.print(f"queue    {wait}", highlight=False, markup=False)
    elif status["reason"]:
        why = f"{status['failure_class']}: " if status["failure_class"] else ""
        console.print(f"reason   {why}{status['reason']}", highlight=False, markup=False)
    for line in status["evidence"] or ():
        console.print(f"evidence {line}", highlight=False, markup=False, soft_wrap=True)
    if advice := document["advice"]:
        console.print(f"advice   {advice}", highlight=False, markup=False, soft_wrap=True)
    for attempt in document["attempts"][:-1]:
        console.print(f"earlier  {_attempt(attempt)}", highlight=False, markup=False, soft_wrap=True)
    if job["id"]:
        console.print(f"job      {job['scheduler']} {job['id']}", highlight=False)
    if whole and document["last"]:
        rows = run.metrics()
        done = f"{document['steps_done']} of {document['steps']}"
        console.print(f"step     {done}: {figures(rows[-1])}", highlight=False)
    if whole and (used := network.line(run)):
        console.print(f"network  {used.partition(': ')[2]}", highlight=False, markup=False, soft_wrap=True)
        for warning in network.warnings(run):
            console.print(f"remark   {warning}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    for line in _when(document):
        console.print(line, highlight=False)
    console.print(f"folder   {document['path']}", highlight=False)
    return 0


def _attempt(about: dict[str, Any]) -> str:
    """One line of an attempt that others followed."""
    how = " ".join(filter(None, (about.get("state"), about.get("failure_class"))))
    return f"attempt {about['attempt']}, {how or 'of which no more is known'}: {about.get('reason') or ''}".rstrip(": ")


def _when(document: dict[str, Any]) -> list[str]:
    """Lines on when a run ends, and whether its time limit comes before."""
    left_s, told = document["time_left_s"], []
    if document["eta_s"] is not None:
        told.append(f"ends in  {_eta(document)}, by the step time as {document['eta_from']}")
    if left_s is not None and document["status"]["state"] == "running":
        cut = document["eta_s"] is not None and left_s < document["eta_s"]
        told.append(f"limit    {span(left_s)} left{', which is not enough' if cut else ''}")
    return told


def show_logs(arguments: argparse.Namespace, console: Console) -> int:
    """What a rank printed in the newest attempt, or the batch script; with --follow, all ranks until the run ends."""
    run = pick(arguments.runs, arguments.run)
    tails = Tails(run, arguments.rank or (ALL if arguments.follow else "0"))
    if arguments.follow:
        watch = Watch(run)
        follow_logs(tails, lambda: watch.status().ended, (lambda text: None) if arguments.json else print_now)
    if not tails.found():
        raise ConfigError(Problem("--rank", arguments.rank, f"has no log; there is: {tails.others()}", "--rank 0"))
    if arguments.json:
        print(json.dumps({"run_id": run.run_id, **tails.document()}, indent=2))
    elif not arguments.follow:
        for text in tails.all_there_is():
            print_now(text)
    return 0


def wait_for(arguments: argparse.Namespace, console: Console) -> int:
    """Show a run's steps until it ends; exit code 0 where it completed, else 1. An interrupt leaves it alone.

    Of a sweep until none of its jobs runs or waits; 0 where all points that are not refused completed.
    """
    if (sweep := sweep_jobs.pick_sweep(arguments.runs, arguments.run)) is not None:
        return sweep_jobs.wait(sweep, arguments, console)
    run = pick(arguments.runs, arguments.run)
    steps = describe(run)["steps"] or 1
    with understood(run):
        return tell_end(run, steps, console, as_json=arguments.json)


def cancel_run(arguments: argparse.Namespace, console: Console) -> int:
    """End a run, or the jobs of a sweep, and wait until it has, in Slurm up to its KillWait and 30 s; exit code 1 if it
    has not ended then."""
    if (sweep := sweep_jobs.pick_sweep(arguments.runs, arguments.run)) is not None:
        return sweep_jobs.cancel(sweep, arguments, console)
    run = pick(arguments.runs, arguments.run)
    errors = Console(stderr=True)

    def tell(longest_s: float) -> None:
        errors.print(
            f"cancelling {run.run_id}: Slurm accepted it, and gives the job time to end; this waits up to "
            f"{span(longest_s)}, and an interrupt only ends the waiting",
            highlight=False,
            soft_wrap=True,
        )

    status = cancel(run, tell)
    if not status.ended:
        wait = f"python -m piper_hpc.jobs wait {run.run_id}"
        errors.print(f"it has not ended yet; wait for it with: {wait}", highlight=False, soft_wrap=True)
    if arguments.json:
        print(json.dumps({"run_id": run.run_id, "status": asdict(status)}, indent=2))
    else:
        console.print(f"{run.run_id} {status.state}", highlight=False)
    return 0 if status.ended else 1


def main() -> int:
    """The command."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--runs", type=Path, default=Path("runs"), help="where runs are kept (default: runs)")
    shared.add_argument("--json", action="store_true", help="print one JSON document")
    parser = argparse.ArgumentParser(prog="python -m piper_hpc.jobs", description=__doc__)
    commands = parser.add_subparsers(
        required=True, metavar="{list,status,logs,wait,cancel,resume,sync,dashboard,compare}"
    )
    actions = {"list": list_runs, "status": show_status, "logs": show_logs, "wait": wait_for, "cancel": cancel_run}
    for name, action in actions.items():
        command = commands.add_parser(name, parents=[shared], help=action.__doc__, description=action.__doc__)
        command.set_defaults(action=action)
        if name != "list":
            command.add_argument("run", help="run id, its beginning or end, a path, `latest`, or a sweep's name")
        if name == "logs":
            whose = "a number, `all`, or `batch` for what the job printed outside its ranks (default: 0, with -f all)"
            command.add_argument("--rank", type=whose_log, help=whose)
            command.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    resume.register(commands, shared, pick)
    sync.register(commands, shared, pick)
    dashboard.register(commands, shared, pick)
    compare.register(commands, shared, pick)
    arguments = parser.parse_args()
    return run_command(lambda: arguments.action(arguments, Console()))


if __name__ == "__main__":
    sys.exit(main())
