"""`python -m piper_hpc.launch [task=...] [group=option] [key=value]`: compose, check, plan, predict, submit, follow."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from piper_hpc.cli import show
from piper_hpc.cli.errors import INTERRUPTED, USAGE_ERROR, message_of, run_command
from piper_hpc.cli.follow import follow
from piper_hpc.cli.plan import show as show_plan
from piper_hpc.cli.sweep import sweep_point
from piper_hpc.cluster.machine import Machine, check_submission, describe
from piper_hpc.cluster.placement import request
from piper_hpc.cluster.resume import resumed_rows
from piper_hpc.config import ConfigError, Experiment, Problem, check_experiment, register
from piper_hpc.config.slurm_checks import command_line
from piper_hpc.config.workload import planned_workload
from piper_hpc.forecast import calibration_notes, calibration_of, forecast
from piper_hpc.paths import OWN_FOLDER, data_folder, own_folder
from piper_hpc.planner import export
from piper_hpc.planner import save as saved
from piper_hpc.planner import trace as traced
from piper_hpc.planning import (
    balance_of,
    better_layout,
    cluster_of,
    plan_of,
    schedule_of,
    with_best_layout,
    with_parallelism,
)
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.runs import RunFolder, Status, new_run_id
from piper_hpc.runs.folder import utc_now
from piper_hpc.runs.manifest import provenance
from piper_hpc.spec import AUTO, Prediction, SpecError
from piper_hpc.submit.by_hand import job_around, requeued
from piper_hpc.submit.executors import preview, submit
from piper_hpc.submit.outcome import cancel
from piper_hpc.train.settings import WARMUP_STEPS

LOG_WIDTH = 120
"""Columns of a table that goes to a file."""


def launch(
    composed: DictConfig, console: Console, overrides: Sequence[str], sweep: dict[str, Any] | None = None
) -> tuple[dict[str, Any], int]:
    """Do what one composed configuration asks for. Returns its JSON document and an exit code.

    overrides: the words of the command that the configuration was composed from. sweep: what the manifest says of the
    sweep that it is one point of.
    """
    experiment = check_experiment(composed)
    if not experiment.submit and (again := requeued(experiment.runs, overrides)) is not None:
        return _prepared(again, experiment), 0
    machine = describe(experiment.cluster)
    if experiment.task.name == "plan":
        return _planned(experiment, machine, console, overrides), 0
    if experiment.layout is None and experiment.task.name != "microbench":
        # The executor's own space: what it lacks cannot be trained.
        composed = with_best_layout(composed, plan_of(experiment, machine, "piper"))
        experiment = check_experiment(composed)
    if experiment.layout is not None and experiment.layout.schedule == AUTO:
        choice = schedule_of(experiment, machine)
        show.chosen_schedule(choice, console)
        composed = with_parallelism(composed, schedule=choice.layout.schedule, vpp=choice.layout.vpp)
        experiment = check_experiment(composed)
    placement = request(experiment.cluster, experiment.layout, machine.environment)
    prediction, notes = _predict(experiment, machine)
    earlier = resumed_rows(experiment, machine)
    run = RunFolder(experiment.runs / new_run_id())
    if experiment.dry_run:
        text = preview(run.path, experiment.cluster, placement)
        show.preview(text, prediction, experiment, machine.memory_bytes, notes, console)
        return {"script": text, "prediction": prediction.document() if prediction else None}, 0

    if experiment.submit:
        check_submission(experiment.cluster, machine)
    run = _prepare(run, composed, machine, prediction, earlier, experiment.runs_mode, sweep)
    if not experiment.submit:
        if job := job_around(overrides):
            run.write_job(job)
        return _prepared(run, experiment), 0
    try:
        with run.own_umask():  # jobs inherit it, of Slurm too
            submit(
                run,
                experiment.cluster,
                environment=machine.environment,
                wait=experiment.wait,
                placement=placement,
            )
    except Exception:
        shutil.rmtree(run.path)  # nothing was submitted: leave nothing behind
        raise
    show.doubts(prediction, experiment, machine.memory_bytes, console)
    show.calibration_notes(notes, console)
    if not experiment.wait:
        console.print(f"submitted {run.run_id}; follow it with: python -m piper_hpc.jobs status {run.run_id}")
        return {"run_id": run.run_id, "path": str(run.path)}, 0
    return _wait(run, experiment, machine, console, overrides)


def _planned(experiment: Experiment, machine: Machine, console: Console, overrides: Sequence[str]) -> dict[str, Any]:
    """Plan and show it; save its best layout for training, its timeline, and its arguments for another project, where
    they are asked for."""
    name, trained = experiment.plan.save, experiment.workload
    experiment, source = planned_workload(experiment, overrides)
    try:
        option = saved.check_name(name, Path.cwd()) if name else None
        trace = traced.check_path(experiment.plan.trace, Path.cwd()) if experiment.plan.trace else None
        target = experiment.plan.export
        exported = export.check_file(target, experiment.plan.export_file, Path.cwd()) if target else None
        found = plan_of(experiment, machine, experiment.task.executor)
        show_plan(found, experiment, source, console)
        notes = calibration_notes(experiment, machine, cluster_of(experiment, machine).calibration)
        show.calibration_notes([*(found.candidates[0].notes if found.candidates else ()), *notes], console)
        document = found.document() | {"workload_source": source}
        balance = balance_of(found, experiment, machine) if found.candidates else None
        if balance is not None:
            show.balance_price(balance, console)
            document["balance"] = asdict(balance)
        arguments = export.compose(found, experiment.model, target) if target else ""
        if trace is not None:
            traced.write(found, experiment.model, cluster_of(experiment, machine), trace)
            console.print(f"wrote {trace}; open it at https://ui.perfetto.dev", highlight=False)
            document["trace"] = str(trace)
        if name and option is not None:
            own = found if found.executor == "piper" else plan_of(experiment, machine, "piper")
            best = saved.best_of_executor(name, found, own)
            saved.save(own, best, option)
            # What the plan took from the model, training would take from its own defaults.
            facts = {fact: getattr(experiment.workload, fact) for fact in source}
            taken = "".join(
                f" train.{fact}={value}" for fact, value in facts.items() if value != getattr(trained, fact)
            )
            train = f"python -m piper_hpc.launch parallelism={name}{taken}"
            console.print(f"saved {option}; train with: {train}", highlight=False)
            document["saved"] = {"path": str(option), "layout": asdict(best.layout)}
        if exported is not None:
            export.write(arguments, exported)
            console.print(f"wrote {exported}", highlight=False)
            document["export"] = str(exported)
    except SpecError as error:
        raise ConfigError(*error.problems) from error
    return document


def _predict(experiment: Experiment, machine: Machine) -> tuple[Prediction | None, Sequence[str]]:
    """The prediction with its notes, or why there is none."""
    if experiment.task.name == "microbench":
        return None, ()
    calibration = calibration_of(experiment, machine)
    if calibration is None:
        return None, calibration_notes(experiment, machine, None)
    try:
        prediction = forecast(experiment, machine, calibration)
    except ResourceModelError as error:
        given = experiment.cluster.calibration
        raise ConfigError(Problem("cluster.calibration", given, str(error), "cluster.calibration=off")) from error
    return prediction, prediction.notes


def _prepare(
    run: RunFolder,
    composed: DictConfig,
    machine: Machine,
    prediction: Prediction | None,
    earlier: list[dict[str, Any]],
    mode: int,
    sweep: dict[str, Any] | None,
) -> RunFolder:
    run = RunFolder.create(run.path.parent, run.run_id, mode)
    run.write_config(OmegaConf.to_yaml(composed, resolve=True))
    facts = {"machine": asdict(machine)} | ({"sweep": sweep} if sweep else {})
    run.write_manifest({"run_id": run.run_id, "created": utc_now(), **provenance(), **facts})
    if prediction is not None:
        run.write_prediction(prediction.document())
    for row in earlier:
        run.append_measurement(row, row["attempt"])
    run.write_status(Status("pending"))
    return run


def _prepared(run: RunFolder, experiment: Experiment) -> dict[str, Any]:
    """Tell a batch script its run."""
    if experiment.format == "text":
        print(run.path)
    return {"run_id": run.run_id, "path": str(run.path)}


def _wait(
    run: RunFolder, experiment: Experiment, machine: Machine, console: Console, overrides: Sequence[str]
) -> tuple[dict[str, Any], int]:
    profiled = WARMUP_STEPS + experiment.task.profile_steps
    steps = profiled if experiment.task.name == "profile" else experiment.train.steps
    console.print(f"run {run.run_id} on {experiment.cluster.name}", highlight=False)
    try:
        status = follow(run, steps, console, wide=experiment.task.suites != ["calibration"])
    except KeyboardInterrupt:
        if experiment.cluster.scheduler == "slurm":
            told = f"run {run.run_id} goes on; end it with: python -m piper_hpc.jobs cancel {run.run_id}"
            console.print(told, highlight=False, soft_wrap=True)
            document = {"run_id": run.run_id, "path": str(run.path), "status": asdict(run.status())}
            return document, INTERRUPTED
        status = cancel(run)
        console.print(f"run {run.run_id} {status.state}")
        if experiment.task.name == "microbench":
            show.unfinished_microbench(run, console)
        return {"run_id": run.run_id, "path": str(run.path), "status": asdict(status)}, INTERRUPTED
    document = show.outcome(run, status, experiment, console)
    if status.state == "completed" and experiment.task.name == "train":
        document |= _better(experiment, machine, console, overrides)
    return document, 0 if status.state == "completed" else 1


def _better(experiment: Experiment, machine: Machine, console: Console, overrides: Sequence[str]) -> dict[str, Any]:
    """Say what the best layout would give, where it is another and worth a run."""
    try:
        better = better_layout(experiment, machine)
    except Exception as error:  # the run is over and its result told: nothing takes that back
        console.print(f"no other layout was planned: {error}", highlight=False, markup=False, soft_wrap=True)
        return {}
    if better is None:
        return {}
    show.suggest_layout(better, overrides, console)
    return {"better_layout": asdict(better)}


def _add_own_options() -> None:
    """Let Hydra find the user's own files: in the folder of --config-dir, else of PIPER_CONF, else in the `conf` where
    the command runs, if plans were saved there. Batch scripts are then looked for in the same folder."""
    for index, word in enumerate(sys.argv):
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd") and (value or len(sys.argv) > index + 1):
            os.environ[OWN_FOLDER] = str(Path(value or sys.argv[index + 1]).absolute())
            return
    saved_here = saved.folder_of_user(Path.cwd())
    is_own = saved_here.resolve() != data_folder("conf").resolve()
    found = own_folder() or (saved_here if (saved_here / "parallelism").is_dir() and is_own else None)
    if found is not None:
        os.environ[OWN_FOLDER] = str(found.absolute())
        sys.argv[1:1] = ["--config-dir", str(found)]


def _show_own_options(console: Console) -> None:
    """Say which options are the user's own, and where they lie."""
    own = own_folder()
    if own is None:
        return
    choices = HydraConfig.get().runtime.choices
    taken = [f"{group}={option}" for group, option in choices.items() if (own / group / f"{option}.yaml").is_file()]
    if taken:
        console.print(f"from {own}: {', '.join(sorted(taken))}", highlight=False)


def main() -> int:
    """The command."""
    register()
    documents: list[dict[str, Any]] = []
    codes: list[int] = []
    as_json: list[bool] = []
    sweeps: list[bool] = []

    def one(composed: DictConfig) -> None:
        as_json.append(composed.format == "json")
        sweeps.append(HydraConfig.get().mode == RunMode.MULTIRUN)
        # Standard output belongs to the document, or to the path that a batch script reads.
        console = Console(stderr=as_json[-1] or not composed.submit)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console.width = LOG_WIDTH
        _show_own_options(console)
        try:
            document, code = launch(composed, console, list(HydraConfig.get().overrides.task), sweep_point())
        except ConfigError as error:
            if not sweeps[-1]:
                raise
            # One bad point of a sweep is a result like the others'.
            print(message_of(error), file=sys.stderr)
            document, code = {"errors": [asdict(problem) for problem in error.problems]}, USAGE_ERROR
        documents.append(document)
        codes.append(code)

    def command() -> int:
        command_line(sys.argv[1:])  # before Hydra, which keeps a sweep's words
        _add_own_options()
        decorated = hydra.main(version_base="1.3", config_path=str(Path(data_folder("conf"))), config_name="config")
        decorated(one)()
        if as_json and all(as_json):
            print(json.dumps(documents if any(sweeps) else documents[0], indent=2))
        return max(codes, default=0)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
