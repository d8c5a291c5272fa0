"""`python -m piper_hpc.jobs {list,status,logs,cancel}`: what was submitted, and what became of it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.cli.errors import run_command
from piper_hpc.cli.follow import figures
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report import write as report
from piper_hpc.runs import RunFolder, find
from piper_hpc.submit.outcome import cancel, observe
from piper_hpc.train.settings import WARMUP_STEPS


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


def describe(run: RunFolder) -> dict[str, Any]:
    """One run's state, as the scheduler sees it now, with its last step."""
    status = observe(run)
    config, job, rows = run.config(), run.job(), run.metrics()
    last = rows[-1] if rows else None
    profiled = config["task"]["name"] == "profile"
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "task": config["task"]["name"],
        "model": config["model"]["name"],
        "cluster": config["cluster"]["name"],
        "job": {"scheduler": job.get("scheduler"), "id": job.get("id")},
        "status": asdict(status),
        "steps": WARMUP_STEPS + config["task"]["profile_steps"] if profiled else config["train"]["steps"],
        "steps_done": last["step"] + 1 if last else 0,
        "last": {key: last[key] for key in ("step", "loss", "tokens_per_s", "mfu")} if last else None,
    }


def list_runs(arguments: argparse.Namespace, console: Console) -> int:
    """All runs, newest last."""
    documents = [describe(run) for run in find(arguments.runs)]
    if arguments.json:
        print(json.dumps(documents, indent=2))
        return 0
    if not documents:
        console.print(f"no runs in {arguments.runs}; start one with: python -m piper_hpc.launch")
        return 0
    table = Table("run", "task", "model", "cluster", "state", "step", "loss", box=None, header_style="bold")
    for document in documents:
        status, last = document["status"], document["last"]
        state = status["state"] + (f" ({status['failure_class']})" if status["failure_class"] else "")
        step = f"{document['steps_done']}/{document['steps']}" if last else ""
        loss = f"{last['loss']:.3f}" if last and last["loss"] is not None else ""
        words = (document["run_id"], document["task"], document["model"], document["cluster"], state, step, loss)
        table.add_row(*words)
    console.print(table)
    return 0


def show_status(arguments: argparse.Namespace, console: Console) -> int:
    """One run; writes the report of a completed one whose launcher did not wait for it."""
    run = pick(arguments.runs, arguments.run)
    document = describe(run)
    if document["status"]["state"] == "completed" and document["last"] and not (run.path / "report.md").exists():
        report.write(run)
    if arguments.json:
        print(json.dumps(document, indent=2))
        return 0
    status, job = document["status"], document["job"]
    console.print(
        f"[bold]{run.run_id}[/]  {document['task']} {document['model']} on {document['cluster']}", highlight=False
    )
    console.print(f"state    {status['state']}, attempt {status['attempt']}", highlight=False)
    if status["reason"]:
        console.print(f"reason   {status['failure_class'] or ''}: {status['reason']}", highlight=False, markup=False)
    console.print(f"job      {job['scheduler']} {job['id']}", highlight=False)
    if document["last"]:
        rows = run.metrics()
        done = f"{document['steps_done']} of {document['steps']}"
        console.print(f"step     {done}: {figures(rows[-1])}", highlight=False)
    console.print(f"folder   {document['path']}", highlight=False)
    return 0


def show_logs(arguments: argparse.Namespace, console: Console) -> int:
    """What one rank printed in the newest attempt; with --follow, also what it prints from now on."""
    run = pick(arguments.runs, arguments.run)
    attempts = sorted(run.logs.glob("attempt-*"), key=lambda path: int(path.name.removeprefix("attempt-")))
    path = (attempts[-1] if attempts else run.logs) / f"rank-{arguments.rank}.log"
    if not path.exists():
        have = ", ".join(sorted(found.name for found in attempts[-1].glob("rank-*.log"))) if attempts else "none yet"
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
    commands = parser.add_subparsers(required=True, metavar="{list,status,logs,cancel}")
    actions = {"list": list_runs, "status": show_status, "logs": show_logs, "cancel": cancel_run}
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
