"""`jobs resume`: a run goes on in its folder from its newest checkpoint, also with another layout or other nodes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from piper_hpc.cli import sweep_jobs
from piper_hpc.cli.follow import tell_end
from piper_hpc.cluster.machine import Machine, check_submission, describe
from piper_hpc.cluster.placement import request
from piper_hpc.config import ConfigError, Experiment, Problem, check_experiment
from piper_hpc.config.slurm_checks import command_line
from piper_hpc.forecast import calibration_of, forecast
from piper_hpc.paths import data_folder, own_folder
from piper_hpc.resolve import settle
from piper_hpc.runs import RunFolder, Status, attempts, understood
from piper_hpc.runs.checkpoints import Sidecar, newest
from piper_hpc.runs.folder import utc_now
from piper_hpc.spec.secrets import hidden
from piper_hpc.submit.evidence import printed
from piper_hpc.submit.executors import submit
from piper_hpc.submit.going_on import new_steps
from piper_hpc.submit.outcome import AWAITED, observe

Pick = Callable[[Path, str], RunFolder]
FIXED = ("runs", "runs_mode", "task", "dry_run", "submit")
"""Keys that a run keeps for good, or that ask for another command."""
DEGREES = ("cluster.nodes", "cluster.ranks_per_node", "parallelism.pp", "parallelism.ep", "parallelism.etp")


def register(commands: Any, shared: argparse.ArgumentParser, pick: Pick) -> None:
    """Add the command."""
    text = "Let a run that ended go on from its newest checkpoint in its folder, or a sweep with what is left"
    command = commands.add_parser("resume", parents=[shared], help=text, description=text)
    command.add_argument("run", help="run id, its beginning or end, a path, `latest`, or a sweep's name")
    changes = "what is to be another: parallelism.pp=2, parallelism=auto, cluster.nodes=8, train.steps=2000, wait=false"
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=changes)
    command.set_defaults(action=lambda arguments, console: resume(arguments, console, pick))


def resume(arguments: argparse.Namespace, console: Console, pick: Pick) -> int:
    """The command: exit code 0 where the run completed, or was submitted with wait=false."""
    command_line(arguments.overrides)
    if (sweep := sweep_jobs.pick_sweep(arguments.runs, arguments.run)) is not None:
        if arguments.overrides:
            rule = "a sweep's points stay as they are"
            raise ConfigError(Problem("KEY=VALUE", arguments.overrides[0], rule, "a second launch -m with it"))
        return sweep_jobs.resume(sweep, arguments, console)
    run = pick(arguments.runs, arguments.run)
    with understood(run):
        experiment = start(run, arguments.overrides)
    if not experiment.wait:
        document = {"run_id": run.run_id, "path": str(run.path)}
        text = f"submitted {run.run_id}; follow it with: python -m piper_hpc.jobs status {run.run_id}"
        print(json.dumps(document, indent=2)) if arguments.json else console.print(text, highlight=False)
        return 0
    return tell_end(run, experiment.train.steps, console, as_json=arguments.json)


def start(run: RunFolder, overrides: Sequence[str]) -> Experiment:
    """Submit the run's next attempt. Raises ConfigError, with everything as it was, where it cannot go on so."""
    before, status = run.config(), _ended(run)
    number = run.newest_attempt()
    composed = with_overrides(before, [*_without(run, number, status, before), *overrides])
    experiment = check_experiment(composed)
    machine = describe(experiment.cluster)
    composed, experiment, _ = settle(composed, experiment, machine)
    _check(run, status, experiment)
    check_submission(experiment.cluster, machine)
    placement = request(experiment.cluster, experiment.layout, machine.environment)
    kept = {name: (run.path / name).read_text() for name in ("config.yaml", "manifest.json", "status.json", "job.json")}
    if run.attempts() and "state" not in run.attempt(number):
        attempts.close(run, number, status, new_steps=new_steps(run, number))
    try:
        _prepare(run, composed, experiment, machine, overrides)
        with run.own_umask():
            submit(run, experiment.cluster, environment=machine.environment, wait=experiment.wait, placement=placement)
    except Exception:
        for name, text in kept.items():
            (run.path / name).write_text(text)
        raise
    return experiment


def _ended(run: RunFolder) -> Status:
    status = observe(run)
    if status.ended:
        return status
    rule = f"is {status.state}{f' ({status.reason})' if status.reason else ''}: it goes on by itself"
    cancel = f"python -m piper_hpc.jobs cancel {run.run_id}, to end it first"
    works = "the same command in two minutes" if status.reason == AWAITED else cancel
    raise ConfigError(Problem("RUN", run.run_id, rule, works))


def _without(run: RunFolder, number: int, status: Status, before: dict[str, Any]) -> list[str]:
    """Leave out nodes that failed, where the user has not said which."""
    failed = printed(run, number).failed_nodes if status.failure_class == "node_fail" else ()
    return [f"cluster.exclude={','.join(failed)}"] if failed and not before["cluster"].get("exclude") else []


def with_overrides(before: dict[str, Any], words: Sequence[str]) -> DictConfig:
    """The configuration with other values. A layout that is changed without `parallelism.dp` has as many replicas as
    the ranks give. Raises ConfigError for a word that is no KEY=VALUE, or whose key a run keeps."""
    composed = OmegaConf.create(before)
    problems = []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if not equals or not key or key.split(".")[0] in FIXED:
            rule = "is kept by a run that goes on" if equals else "must be KEY=VALUE"
            problems.append(Problem(key or word, value or word, rule, "train.steps=2000 or parallelism.pp=2"))
        elif "." not in key and isinstance(before.get(key), dict):
            problems += _take_group(composed, key, value)
        else:
            OmegaConf.update(composed, key, _parsed(word, value), force_add=True)
    if problems:
        raise ConfigError(*problems)
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    if keys & {*DEGREES, "parallelism"} and "parallelism.dp" not in keys:
        OmegaConf.update(composed, "parallelism.dp", None)
    return composed


def _take_group(composed: DictConfig, group: str, option: str) -> list[Problem]:
    """Put a file of conf/ in place of the group's values."""
    own = own_folder()
    places = [folder / group / f"{option}.yaml" for folder in (own, data_folder("conf")) if folder is not None]
    found = next((Path(str(place)) for place in places if Path(str(place)).is_file()), None)
    if group != "parallelism" or found is None:
        rule = "names no file of conf/" if group == "parallelism" else "can be chosen by single keys alone"
        return [Problem(group, option, rule, "parallelism=auto or parallelism=pp2_ep2")]
    placement = composed.parallelism.placement
    composed[group] = OmegaConf.merge({"placement": placement}, OmegaConf.load(found))
    return []


def _parsed(word: str, value: str) -> Any:
    try:
        return OmegaConf.from_dotlist([f"value={value}"])["value"]
    except (OmegaConfBaseException, YAMLError) as error:
        rule = str(error).splitlines()[0]
        raise ConfigError(Problem(word.partition("=")[0], value, rule, "a value in YAML")) from None


def _check(run: RunFolder, status: Status, experiment: Experiment) -> None:
    """That there is something left to do, and that the newest checkpoint can be gone on from."""
    found = newest(run.checkpoints)
    if found is not None:
        sidecar = Sidecar.read(found)
        train = experiment.train
        if differences := sidecar.origin.disagreements(experiment.model, seed=train.seed, dtype=train.dtype):
            raise ConfigError(*differences)
    rows = run.metrics()
    done = int(rows[-1]["step"]) + 1 if rows else 0
    if status.state == "completed" and done >= experiment.train.steps:
        rule = f"has done all of its {experiment.train.steps} steps"
        raise ConfigError(Problem("RUN", run.run_id, rule, f"train.steps={2 * experiment.train.steps}"))


def _prepare(
    run: RunFolder, composed: DictConfig, experiment: Experiment, machine: Machine, overrides: Sequence[str]
) -> None:
    """The record of the next attempt: what it is to do, on which machine, and that it is pending."""
    (run.path / "job.json").unlink()  # the job before is over: who looks now shall not take its end for this one's
    run.write_status(Status("pending", run.newest_attempt() + 1))
    run.write_config(OmegaConf.to_yaml(composed, resolve=True))
    manifest = run.manifest()
    told = {"time": utc_now(), "command": [hidden(word) for word in sys.argv], "overrides": list(overrides)}
    run.write_manifest(manifest | {"machine": asdict(machine), "resumes": [*manifest.get("resumes", []), told]})
    calibration = calibration_of(experiment, machine) if experiment.layout is not None and overrides else None
    if calibration is not None:
        prediction = forecast(experiment, machine, calibration)
        note = f"made again for attempt {run.newest_attempt() + 1}, which has {' '.join(overrides)}"
        run.write_prediction(replace(prediction, notes=[*prediction.notes, note]).document())
