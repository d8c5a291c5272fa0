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
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from piper_hpc.cli import show
from piper_hpc.cli.errors import INTERRUPTED, run_command
from piper_hpc.cli.follow import follow
from piper_hpc.cli.plan import show as show_plan
from piper_hpc.cluster.machine import Machine, check_submission, describe
from piper_hpc.cluster.resume import resumed_rows
from piper_hpc.config import ConfigError, Experiment, check_experiment, register
from piper_hpc.config.slurm_checks import command_line
from piper_hpc.config.workload import planned_workload
from piper_hpc.forecast import calibration_notes
from piper_hpc.paths import OWN_FOLDER, data_folder, own_folder
from piper_hpc.planner import export
from piper_hpc.planner import save as saved
from piper_hpc.planner import trace as traced
from piper_hpc.planning import balance_of, better_layout, cluster_of, plan_of
from piper_hpc.resolve import create_run, resolve
from piper_hpc.runs import RunFolder, new_run_id
from piper_hpc.spec import SpecError
from piper_hpc.submit.by_hand import job_around, requeued
from piper_hpc.submit.executors import preview, submit
from piper_hpc.submit.outcome import cancel
from piper_hpc.sweep.compose import grid_of
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
    found = resolve(composed, experiment, machine)
    composed, experiment, placement = found.composed, found.experiment, found.placement
    prediction, notes = found.prediction, found.notes
    if found.schedule is not None:
        show.chosen_schedule(found.schedule, console)
    earlier = resumed_rows(experiment, machine)
    run = RunFolder(experiment.runs / new_run_id())
    if experiment.dry_run:
        text = preview(run.path, experiment.cluster, placement)
        show.preview(text, prediction, experiment, machine.memory_bytes, notes, console)
        return {"script": text, "prediction": prediction.document() if prediction else None}, 0

    if experiment.submit:
        check_submission(experiment.cluster, machine)
    run = create_run(
        run,
        OmegaConf.to_yaml(composed, resolve=True),
        found.identity,
        machine,
        prediction.document() if prediction is not None else None,
        experiment.runs_mode,
        earlier=earlier,
        sweep=sweep,
    )
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


def _one(composed: DictConfig, console: Console, command: Sequence[str]) -> tuple[Any, int]:
    """One configuration, or with sweep=plan the layouts that it is planned to."""
    if composed.sweep.name == "plan":
        from piper_hpc.multirun import run_plan

        return run_plan(composed, console, command)
    return launch(composed, console, list(HydraConfig.get().overrides.task))


def main() -> int:
    """The command."""
    register()
    answers: list[Any] = []
    codes: list[int] = []

    def command() -> int:
        command_line(sys.argv[1:])  # before Hydra
        words = list(sys.argv)
        grid = grid_of(words[1:])
        if grid is not None:
            sys.argv[1:] = [*grid.flags, *grid.words[0]]
        _add_own_options()

        def run(composed: DictConfig) -> None:
            sys.argv[:] = words  # the record has the command as it was given
            # Standard output belongs to the document, or to the path that a batch script reads.
            console = Console(stderr=composed.format == "json" or not composed.submit)
            if not console.is_terminal and "COLUMNS" not in os.environ:
                console.width = LOG_WIDTH
            _show_own_options(console)
            if grid is not None:
                from piper_hpc.multirun import run_grid  # a sixth of a second, which other launches are spared

                answer, code = run_grid(grid, console, launch, words)
            else:
                answer, code = _one(composed, console, words)
            if composed.format == "json":
                answers.append(answer)
            codes.append(code)

        decorated = hydra.main(version_base="1.3", config_path=str(Path(data_folder("conf"))), config_name="config")
        decorated(run)()
        for answer in answers:
            print(json.dumps(answer, indent=2))
        return max(codes, default=0)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
