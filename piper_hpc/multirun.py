"""Many points of one command: `-m`, and the best layouts of a plan (sweep=plan)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from piper_hpc.cli import sweep as show
from piper_hpc.cli.errors import INTERRUPTED, USAGE_ERROR, message_of
from piper_hpc.cluster.machine import describe
from piper_hpc.config import ConfigError, Experiment, Problem, check_experiment
from piper_hpc.planning import plan_of
from piper_hpc.report.points import PointRow, regret
from piper_hpc.resolve import with_layout
from piper_hpc.runs.folder import utc_now
from piper_hpc.runs.sweeps import SweepFolder, SweepPoint, new_name
from piper_hpc.spec import Layout
from piper_hpc.sweep.compose import Composer, Grid
from piper_hpc.sweep.points import Checked, Compose, check_all, completed, points_of
from piper_hpc.sweep.start import create, document_of, first_submission, in_background
from piper_hpc.sweep.submit import Queue, array_script, tasks_of

Launch = Callable[[DictConfig, Console, Sequence[str], dict[str, Any] | None], tuple[dict[str, Any], int]]
Answer = tuple[list[dict[str, Any]], int]
"""A document for each point, and an exit code."""


def run_grid(grid: Grid, console: Console, launch: Launch, command: Sequence[str]) -> Answer:
    """All points of `-m`. launch: one configuration; plans, and runs that a batch script prepares, go one by one."""
    running = HydraConfig.get()
    composer = Composer(grid, str(running.job.config_name), tuple(running.overrides.hydra))
    first = composer.config(0)
    if first.sweep.name == "plan":
        rule = "chooses the points by itself"
        raise ConfigError(Problem("sweep", "plan", rule, "the command without -m, or without sweep=plan"))
    if first.task.name == "plan" or not first.submit:
        return _one_by_one(grid, composer, console, launch)
    return _pools(composer.config, grid.axes, "grid", command, console)


def _one_by_one(grid: Grid, composer: Composer, console: Console, launch: Launch) -> Answer:
    documents, codes, name = [], [], new_name(utc_now())
    for index, (words, axes) in enumerate(zip(grid.words, grid.axes, strict=True)):
        sweep = {"name": name, "index": index, "axes": axes}
        try:
            document, code = launch(composer.config(index), console, words, sweep)
        except ConfigError as error:
            # One bad point of a sweep is a result like the others'.
            print(message_of(error), file=sys.stderr)
            document, code = {"errors": [asdict(problem) for problem in error.problems]}, USAGE_ERROR
        documents.append(document)
        codes.append(code)
    return documents, max(codes, default=0)


def run_plan(composed: DictConfig, console: Console, command: Sequence[str]) -> Answer:
    """The best layouts of a plan, one after the other on the same nodes."""
    planned = OmegaConf.merge(composed, {"parallelism": {"auto": True}})  # whatever layout the command has besides
    assert isinstance(planned, DictConfig)
    experiment = check_experiment(planned)
    if experiment.task.name != "train" or not experiment.submit:
        rule = "trains the best layouts of a plan, and submits them itself"
        raise ConfigError(Problem("sweep", "plan", rule, "sweep=plan task=train submit=true"))
    found = plan_of(experiment, describe(experiment.cluster), "piper")
    # As a plan prints them: the best of each (pp, ep, tp, cp), or every candidate.
    ranked = found.candidates if experiment.plan.shades else found.shapes
    layouts = [one.layout for one in ranked[: experiment.sweep.top]]
    if len(layouts) < 2:
        rule = f"compares layouts, and the plan has {len(layouts)}"
        raise ConfigError(Problem("sweep", "plan", rule, "another model or cluster.nodes, or plan.shades=true"))
    default = asdict(Layout())
    differ = [key for key in default if len({asdict(one)[key] for one in layouts}) > 1]
    axes = [{f"parallelism.{key}": getattr(one, key) for key in differ} for one in layouts]
    return _pools(lambda index: with_layout(planned, layouts[index]), axes, "plan", command, console)


def _pools(
    compose: Compose, axes: Sequence[dict[str, Any]], kind: str, command: Sequence[str], console: Console
) -> Answer:
    """Check all points, show what they are and cost, and submit or run those that are new."""
    checked = check_all(compose, len(axes))
    good = next((one for one in checked if not one.problems), None)
    if good is None:
        for text, indices in show.by_reason({one.index: one.problems for one in checked}).items():
            print(f"error: {text} ({show.numbers(indices)})", file=sys.stderr)
        return [{"errors": [asdict(problem) for problem in one.problems]} for one in checked], USAGE_ERROR
    experiment = check_experiment(compose(good.index))
    points = points_of(checked, axes, completed(experiment.runs), experiment.sweep.strict_code)
    code = USAGE_ERROR if any(point.errors for point in points) else 0
    if experiment.dry_run:
        return _preview(checked, points, experiment, kind, command, console), code
    sweep = create(checked, points, experiment, kind, command)
    points, document = sweep.points(), sweep.document()
    show.show_points(points, document, console)
    if all(point.state != "new" for point in points):
        console.print(f"nothing is left to run; sweep {sweep.name}", highlight=False)
    elif experiment.cluster.scheduler == "slurm":
        show.show_submitted(sweep, first_submission(sweep), console)
    elif not experiment.wait:
        pid = in_background(sweep)
        told = f"sweep {sweep.name} runs as process {pid}; follow it with: python -m piper_hpc.jobs status {sweep.name}"
        console.print(told, highlight=False, soft_wrap=True)
    else:
        return _here(sweep, kind, console, code)
    return [_document(sweep, point) for point in points], code


def _here(sweep: SweepFolder, kind: str, console: Console, code: int) -> Answer:
    try:
        rows = show.run_here(sweep, console)
    except KeyboardInterrupt:
        return [_document(sweep, point) for point in sweep.points()], INTERRUPTED
    show.show_rows(rows, kind, console)
    console.print(f"sweep {sweep.name}; a page of it: python -m piper_hpc.jobs dashboard {sweep.name}", highlight=False)
    documents = [
        _document(sweep, point) | {"state": row.state, "failure_class": row.failure_class}
        for point, row in zip(sweep.points(), rows, strict=True)
    ]
    found = regret(rows) if kind == "plan" else None
    documents[0] |= {"regret": asdict(found)} if found is not None else {}
    return documents, max(code, 1 if _any_failed(rows) else 0)


def _any_failed(rows: Sequence[PointRow]) -> bool:
    return any(row.state in ("failed", "cancelled") for row in rows)


def _document(sweep: SweepFolder, point: SweepPoint) -> dict[str, Any]:
    if point.errors:
        return {"sweep": sweep.name, "axes": point.axes, "errors": point.errors}
    path = str(sweep.runs / str(point.run_id))
    before = point.state == "done"
    return {"sweep": sweep.name, "axes": point.axes, "run_id": point.run_id, "path": path, "done_before": before}


def _preview(
    checked: Sequence[Checked],
    points: Sequence[SweepPoint],
    experiment: Experiment,
    kind: str,
    command: Sequence[str],
    console: Console,
) -> list[dict[str, Any]]:
    """What would be submitted: the points, and the script of every array."""
    sweep = SweepFolder(experiment.runs / "sweeps" / "NAME")
    document = document_of(sweep.name, checked, points, experiment, kind, command)
    show.show_points(points, document, console)
    scripts: dict[int, str] = {}
    for group, facts in enumerate(document["groups"]):
        its = [point for point in points if point.group == group and point.state == "new"]
        cluster = checked[its[0].index].cluster
        assert cluster is not None
        if cluster.scheduler == "slurm":
            tasks = tasks_of(its, cluster, Queue(), document["tasks"])
            scripts[group] = array_script(sweep, group, cluster, facts["placement"], tasks)
            console.print(scripts[group], highlight=False, markup=False, soft_wrap=True)
    console.print("nothing submitted", highlight=False)
    return [
        {"axes": point.axes, "errors": point.errors}
        if point.errors
        else {
            "axes": point.axes,
            "script": scripts.get(point.group) if point.group is not None else None,
            "prediction": checked[point.index].prediction,
        }
        for point in points
    ]
