"""`python -m piper_hpc.jobs {list,status,logs,wait,cancel}`: what was submitted, and what became of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from piper_hpc.cli.errors import run_command
from piper_hpc.cli.follow import figures, follow
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report import network
from piper_hpc.report import write as report
from piper_hpc.runs import RecordError, RunFolder, Status, find
from piper_hpc.submit.outcome import cancel, observe, observe_all
from piper_hpc.submit.scheduler import JobState
from piper_hpc.train.settings import WARMUP_STEPS

T = TypeVar("T")


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


def describe(run: RunFolder, jobs: Mapping[str, JobState] | None = None) -> dict[str, Any]:
    """One run's state, as the scheduler sees it now, with its last step.

    jobs: what Slurm says of jobs, where it was asked for many at once. What a torn, foreign or half-written folder does
    not tell is null, and `problem` says why; else `problem` is null.
    """
    problems: list[str] = []

    def known(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except RecordError as error:
            problems.append(error.reason)
        except OSError as error:  # somebody else's folder
            problems.append(str(error))
        return otherwise

    # The manifest, which `find` goes by, names the task where there is no configuration: studies have none.
    nothing: dict[str, Any] = {}
    manifest, config = known(run.manifest, nothing), known(run.config, nothing)
    status = known(lambda: asdict(observe(run, jobs)), dict.fromkeys(Status.__dataclass_fields__))
    job = known(run.job, nothing)
    rows: list[dict[str, Any]] = known(run.metrics, [])

    def at(group: str, key: str) -> Any:
        found = config.get(group)
        if isinstance(found, dict) and key in found:
            return found[key]
        if config:
            problems.append(f"config.yaml has no {group}.{key}")
        return None

    task = at("task", "name") or manifest.get("task")
    steps = at("task", "profile_steps") if task == "profile" else at("train", "steps")
    if isinstance(steps, int) and task == "profile":
        steps += WARMUP_STEPS
    step = rows[-1].get("step") if rows else None
    if rows and not isinstance(step, int):
        problems.append("metrics.jsonl: its last row has no step")
    last = None
    if isinstance(step, int):
        last = {"step": step} | {key: rows[-1].get(key) for key in ("loss", "tokens_per_s", "mfu")}
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "task": task,
        "model": at("model", "name"),
        "cluster": at("cluster", "name"),
        "job": {"scheduler": job.get("scheduler"), "id": job.get("id")},
        "status": status,
        "steps": steps,
        "steps_done": step + 1 if isinstance(step, int) else 0,
        "last": last,
        "problem": "; ".join(dict.fromkeys(problems)) or None,
    }


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
    table = Table("run", "task", "model", "cluster", "state", "step", "loss", box=None, header_style="bold")
    for document in documents:
        status, last = document["status"], document["last"]
        state = (status["state"] or "") + (f" ({status['failure_class']})" if status["failure_class"] else "")
        step = f"{document['steps_done']}/{document['steps']}" if last else ""
        loss = f"{last['loss']:.3f}" if last and isinstance(last["loss"], float) else ""
        words = (document["run_id"], document["task"], document["model"], document["cluster"], state, step, loss)
        table.add_row(*(escape(str(word)) if word is not None else "" for word in words))
    console.print(table)
    for document in documents:
        if document["problem"]:
            console.print(f"{document['run_id']}: {document['problem']}", highlight=False, markup=False)
    return 0


def show_status(arguments: argparse.Namespace, console: Console) -> int:
    """One run; writes the report of a completed one whose launcher did not wait for it."""
    run = pick(arguments.runs, arguments.run)
    document = describe(run)
    whole = document["problem"] is None
    ended_well = document["status"]["state"] == "completed" and document["last"]
    if whole and ended_well and not (run.path / "report.md").exists():
        report.write(run)
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
    if status["reason"]:
        console.print(f"reason   {status['failure_class'] or ''}: {status['reason']}", highlight=False, markup=False)
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
    console.print(f"folder   {document['path']}", highlight=False)
    return 0


def show_logs(arguments: argparse.Namespace, console: Console) -> int:
    """What one rank printed in the newest attempt; with --follow, also what it prints from now on."""
    run = pick(arguments.runs, arguments.run)
    newest = run.logs / f"attempt-{run.newest_attempt()}"
    path = newest / f"rank-{arguments.rank}.log"
    if not path.exists():
        have = ", ".join(sorted(found.name for found in newest.glob("rank-*.log"))) or "none yet"
        raise ConfigError(Problem("--rank", arguments.rank, f"has no log; there is: {have}", "--rank 0"))
    with path.open(errors="replace") as log:
        while True:
            text = log.read()
            if arguments.json:
                print(json.dumps({"run_id": run.run_id, "path": str(path), "text": text}))
                return 0
            sys.stdout.write(text)
            sys.stdout.flush()
            if not arguments.follow or (not text and observe(run).ended):
                return 0
            time.sleep(0.5)


def wait_for(arguments: argparse.Namespace, console: Console) -> int:
    """Show a run's steps until it ends; exit code 0 where it completed, else 1. An interrupt leaves it alone."""
    run = pick(arguments.runs, arguments.run)
    document = describe(run)
    status = follow(run, document["steps"] or 1, Console(stderr=True) if arguments.json else console)
    if arguments.json:
        print(json.dumps(describe(run), indent=2))
    else:
        reason = f": {status.failure_class or ''} {status.reason}" if status.reason else ""
        console.print(f"{run.run_id} {status.state}{reason}", highlight=False, markup=False)
    return 0 if status.state == "completed" else 1


def cancel_run(arguments: argparse.Namespace, console: Console) -> int:
    """End a run that is pending or running."""
    run = pick(arguments.runs, arguments.run)
    status = cancel(run)
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
    commands = parser.add_subparsers(required=True, metavar="{list,status,logs,wait,cancel}")
    actions = {"list": list_runs, "status": show_status, "logs": show_logs, "wait": wait_for, "cancel": cancel_run}
    for name, action in actions.items():
        command = commands.add_parser(name, parents=[shared], help=action.__doc__, description=action.__doc__)
        command.set_defaults(action=action)
        if name != "list":
            command.add_argument("run", help="run id, its beginning or end, a path, or `latest`")
        if name == "logs":
            command.add_argument("--rank", type=int, default=0, help="whose log (default: 0)")
            command.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
    arguments = parser.parse_args()
    return run_command(lambda: arguments.action(arguments, Console()))


if __name__ == "__main__":
    sys.exit(main())
