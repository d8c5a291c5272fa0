"""What will not work here, and how to mend it.

    python -m piper_hpc.doctor                            this machine
    python -m piper_hpc.doctor cluster=frontier cluster.account=abc123        a login node and its Slurm
    python -m piper_hpc.doctor cluster=mysite on=nodes    and every node of a job of that size
    python -m piper_hpc.doctor --write site/mysite.yaml   a cluster file and a batch script, from what sinfo tells

Exit codes: 0 nothing failed, 1 something did, 2 a mistake in what was asked.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from piper_hpc.cli.errors import run_command
from piper_hpc.cluster.machine import describe
from piper_hpc.config import ConfigError, Experiment, Problem, check_experiment, register
from piper_hpc.config.facts import facts_of, old
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.doctor import host, slurm, write
from piper_hpc.doctor.finding import Finding, ok, warning
from piper_hpc.paths import data_folder, own_folder

STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m piper_hpc.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the configuration, as the launcher takes them; on=nodes")
    parser.add_argument("--write", metavar="FILE.yaml", type=Path, help="where to write files for this Slurm")
    parser.add_argument("--partition", help="whose nodes to write, in place of the one with the most GPUs")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    parser.add_argument("--of-node", metavar="PROBE", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.write is not None:
        return run_command(lambda: _write(chosen.write, chosen.partition))
    overrides = [word for word in chosen.overrides if not word.startswith("on=")]
    on = [word for word in chosen.overrides if word.startswith("on=")]
    return run_command(lambda: _examine(overrides, on, chosen.of_node, as_json=chosen.json))


def _examine(overrides: Sequence[str], on: Sequence[str], probe: Path | None, *, as_json: bool) -> int:
    if on not in ([], ["on=nodes"]):
        raise ConfigError(Problem("on", on[-1].partition("=")[2], "must be nodes, or left out", "on=nodes"))
    experiment = _experiment(overrides)
    cluster = experiment.cluster
    if probe is not None:
        for each in _of_node(experiment, probe):
            print(json.dumps(each.document()))  # a line each: srun keeps short lines of many nodes apart
        return 0
    login = cluster.scheduler == "slurm"
    # A login node has no devices, and need not.
    found = host.examine(replace(cluster, device="cpu") if login else cluster, experiment.runs)
    found += facts(cluster, date.today())
    if login:
        environment = describe(cluster).environment
        found += slurm.examine(cluster, environment)
        if on:
            found += slurm.on_nodes(cluster, environment, experiment.runs)
    if as_json:
        print(json.dumps([each.document() for each in found], indent=2))
    else:
        _show(found)
    return 1 if any(each.state == "failed" for each in found) else 0


def facts(cluster: ClusterConfig, today: date) -> Iterator[Finding]:
    """Whether what the cluster's file says of the site was compared with its sources within a year."""
    every = list(facts_of(cluster.name, cluster.checked, cluster.sources))
    if stale := old(every, today):
        named = ", ".join(fact.key for fact in stale[:3]) + (", ..." if len(stale) > 3 else "")
        since = f"{len(stale)} of {len(every)} are older than a year, from {stale[0].known}: {named}"
        yield warning("facts", since, "compare them with the site's pages; python -m piper_hpc.config.facts lists them")
    elif every:
        yield ok("facts", f"{len(every)}, none older than a year")


def _experiment(overrides: Sequence[str]) -> Experiment:
    """The configuration that a measurement would have. Raises ConfigError."""
    register()
    own = own_folder()
    path = [f"hydra.searchpath=[file://{own.absolute()}]"] if own is not None else []
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        return check_experiment(compose("config", overrides=["task=microbench", *path, *overrides]))


def _of_node(experiment: Experiment, probe: Path) -> list[Finding]:
    """What a compute node says of itself, and whether it sees a file that the login node made."""
    found = host.examine(experiment.cluster, experiment.runs)
    if probe.exists():
        found.append(Finding("shared folder", "ok", f"sees {probe.parent}"))
    else:
        mend = "runs=FOLDER on a file system that compute nodes share with this one"
        found.append(Finding("shared folder", "failed", f"does not see {probe.parent}", mend))
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    return [replace(each, where=name) for each in found]


def _show(found: Sequence[Finding]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("where", "what", "", "found", "how to mend it"):
        table.add_column(column, overflow="fold")
    for each in found:
        style = STYLES[each.state]
        table.add_row(each.where or "here", each.subject, f"[{style}]{each.state}[/]", each.found, each.mend)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)
    failed = sum(each.state == "failed" for each in found)
    console.print("nothing failed" if not failed else f"{failed} failed", highlight=False)


def _write(path: Path, name: str | None) -> int:
    if path.suffix != ".yaml":
        raise ConfigError(Problem("--write", str(path), "must end in .yaml", "--write mysite.yaml"))
    try:
        known = write.partitions(write.ask_sinfo(dict(os.environ)))
    except (OSError, subprocess.SubprocessError) as error:
        rule = f"sinfo must answer here: {error}"
        raise ConfigError(Problem("--write", str(path), rule, "a login node, or SLURM_CONF of your Slurm")) from None
    chosen = [each for each in known if name in (None, each.name)]
    if not chosen:
        listed = ", ".join(dict.fromkeys(each.name for each in known)) or "none"
        raise ConfigError(Problem("--partition", str(name), f"must be one of {listed}", "no --partition"))
    try:
        made = write.write(path, chosen[0])
    except FileExistsError as error:
        raise ConfigError(Problem("--write", str(path), str(error), "another name")) from None
    print("\n".join(f"wrote {each}" for each in made))
    print(f"next: PIPER_CONF={path.parent} python -m piper_hpc.launch cluster={path.stem} task=microbench dry_run=true")
    return 0


if __name__ == "__main__":
    sys.exit(main())
