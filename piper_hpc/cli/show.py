"""Tables for the terminal: what would be submitted, how a run went against its prediction. Plans: cli/plan.py."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.cli.measured import fitted, summary
from piper_hpc.config import Experiment
from piper_hpc.planning import BalancePrice, FasterLayout, ScheduleChoice
from piper_hpc.report import facts, load, nccl_tests, network, table
from piper_hpc.report import write as report
from piper_hpc.report.units import seconds, size
from piper_hpc.runs import RunFolder, Status
from piper_hpc.spec import Layout, Prediction


def preview(
    text: str,
    prediction: Prediction | None,
    experiment: Experiment,
    memory_bytes: int,
    notes: Iterable[str],
    console: Console,
) -> None:
    """What would be submitted, what it would cost, and how long it would take. memory_bytes: of a rank; notes: of the
    prediction, or why there is none."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    cluster = experiment.cluster
    hours, ranks = cluster.nodes * cluster.time_min / 60, cluster.nodes * cluster.ranks_per_node
    devices = f", {hours * cluster.ranks_per_node:.4g} device-hours" if cluster.device != "cpu" else ""
    at_most = f"at most {hours:.4g} node-hours{devices}"
    console.print(f"nothing submitted; {cluster.nodes} nodes, {ranks} ranks, {at_most}", highlight=False)
    if prediction is None:
        if experiment.task.name != "microbench":
            console.print("no prediction: this cluster has neither measurements nor a data sheet", highlight=False)
        doubts(prediction, experiment, memory_bytes, console)
        calibration_notes(notes, console)
        return
    training_s, peak = prediction.step_time_s * experiment.train.steps, max(prediction.peak_memory_bytes)
    memory = f"{size(peak)} of {size(memory_bytes)} a rank"
    console.print(
        f"predicted: {training_s:.4g} s for {experiment.train.steps} steps, {memory}, "
        f"from {prediction.calibration['source']}",
        highlight=False,
        soft_wrap=True,
    )
    doubts(prediction, experiment, memory_bytes, console)
    calibration_notes(notes, console)


def doubts(prediction: Prediction | None, experiment: Experiment, memory_bytes: int, console: Console) -> None:
    """Say so where a job would not fit its ranks' memory; of one of Slurm's also where it would end before its steps
    have, where the site has no such job, and where it asks for what is not given. memory_bytes: of a rank."""
    told = []
    peak = max(prediction.peak_memory_bytes) if prediction is not None else 0
    if peak > memory_bytes:
        told.append(
            f"too large: {size(peak)} of memory is predicted for a rank, which has {size(memory_bytes)}; "
            "parallelism=auto takes a layout that fits"
        )
    if experiment.cluster.scheduler == "slurm":
        told += _doubts_of_site(prediction, experiment)
    for line in told:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)


def _doubts_of_site(prediction: Prediction | None, experiment: Experiment) -> list[str]:
    cluster = experiment.cluster
    site = next((limit for limit in cluster.limits if cluster.nodes <= limit.nodes), None)
    told = [
        f"{cluster.name} asks its users for cluster.{key}, which is not given"
        for key in cluster.wants
        if not getattr(cluster, key)
    ]
    if cluster.limits and site is None:
        told.append(f"too wide: as far as its file knows, {cluster.name} has jobs of {cluster.limits[-1].nodes} nodes")
    elif site is not None and cluster.time_min > site.time_min:
        told.append(f"too long: {cluster.name} ends jobs of {cluster.nodes} nodes after {site.time_min} min at most")
    if site is not None and site.qos and cluster.qos != site.qos:
        told.append(f"{cluster.nodes} nodes of {cluster.name} need cluster.qos={site.qos}")
    steps, limit_s = experiment.train.steps, 60 * cluster.time_min
    if prediction is not None and prediction.step_time_s * steps > limit_s:
        needed_min = math.ceil(prediction.step_time_s * steps / 60)
        told.append(
            f"too long: the limit of {limit_s} s ends the job after about {int(limit_s / prediction.step_time_s)} of "
            f"{steps} steps; use cluster.time_min={needed_min} or more, if the site allows it, or train.steps and "
            "train.checkpoint_every, and go on from the last checkpoint with train.resume_from"
        )
    return told


def balance_price(price: BalancePrice, console: Console) -> None:
    """What uneven routing costs the best layout, with and without migration."""
    where = f"busiest rank {price.skew:.2f} of the mean" + (", for example" if price.assumed else "")
    console.print(
        f"imbalance ({where}): {seconds(price.step_time_s)} a step; once experts have moved "
        f"(parallelism.migration=auto; {price.evened_skew:.2f}): {seconds(price.evened_step_time_s)}",
        highlight=False,
        soft_wrap=True,
    )


def outcome(run: RunFolder, status: Status, experiment: Experiment, console: Console) -> dict[str, Any]:
    """How a run ended: its table, its report, its folder; or why it failed. Returns the same as a document."""
    document: dict[str, Any] = {"run_id": run.run_id, "path": str(run.path), "status": asdict(status)}
    if status.state != "completed":
        # Reasons come from anywhere, and gloo's begin with brackets: they are text, not markup.
        words = f"{status.state} {run.run_id}: {status.failure_class}: {status.reason}"
        console.print(words, style="red", highlight=False, markup=False, soft_wrap=True)
        console.print(f"logs: {run.logs}", highlight=False)
        return document
    if status.reason is not None:
        console.print(status.reason, highlight=False, markup=False, soft_wrap=True)
    document["network"] = _used_network(run, console)
    if experiment.task.name == "microbench":
        measured = run.measurements()
        if experiment.task.suites == ["calibration"]:
            shown = measurements(measured)
            # Whole, also where the terminal is narrower: a figure cut short is no figure.
            before = console.width
            console.width = max(before, console.measure(shown, options=console.options.update(width=1000)).maximum)
            console.print(shown)
            console.width = before
        job = run.manifest()["job"]
        for line in (*summary(measured, job), *fitted(job), f"nccl-tests JSON: {nccl_tests.write(run)}", str(run.path)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return document | {"measurements": measured}
    if not run.metrics():
        console.print("no step was left to train", highlight=False)
        return document
    for line in facts.selected_algorithms(run):
        console.print(line, highlight=False, soft_wrap=True)
    rows = table.predicted_against_measured(run)
    console.print(table.render(rows))
    taken = load.metrics(run)
    if not load.timed(taken):
        console.print(facts.NOT_TIMED, highlight=False)
    console.print(facts.rates_line(taken), highlight=False, soft_wrap=True)
    routed = table.with_measured_routing(run)
    if routed is not None:
        console.print(routed.line, highlight=False)
    written = report.write(run)
    for path in (run.path, *written, *sorted(run.path.glob("trace*.json"))):
        console.print(str(path), highlight=False, soft_wrap=True)
    return document | {"table": [asdict(row) for row in rows], "metrics": run.metrics()[-1]}


def _used_network(run: RunFolder, console: Console) -> dict[str, Any]:
    """Shows it, and returns what the record has of it."""
    if line := network.line(run):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for line in network.warnings(run):
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    return network.of(run)


def unfinished_microbench(run: RunFolder, console: Console) -> None:
    """What an interrupted micro-benchmark leaves, and how to go on."""
    rows = run.measurements()
    console.print(f"{len(rows)} rows were measured and are kept in {run.path / 'measurements.jsonl'}", highlight=False)
    if rows:
        console.print(f"go on with the same command and task.resume={run.run_id}", highlight=False)


def calibration_notes(notes: Iterable[str], console: Console) -> None:
    """Of a prediction's notes, what they say of the calibration that it rests on, or of its absence."""
    for note in notes:
        if note.startswith("calibration:"):
            console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


def suggest_layout(layout: FasterLayout, overrides: Sequence[str], console: Console) -> None:
    """What `parallelism=auto` would give instead of the run that ended, and the command for it."""
    default, always = Layout(), ("pp", "ep", "dp", "micro_batch")
    chosen = {axis: value for axis, value in vars(layout.layout).items() if value != getattr(default, axis)}
    others = {axis: value for axis, value in chosen.items() if axis not in (*always, "all_to_all", "placement")}
    shown = {axis: getattr(layout.layout, axis) for axis in always} | others
    degrees = " ".join(f"{axis}={list(value) if isinstance(value, tuple) else value}" for axis, value in shown.items())
    kept = [word for word in overrides if not word.lstrip("+~").startswith("parallelism") or _kept_by_auto(word)]
    command = shlex.join(["python", "-m", "piper_hpc.launch", *kept, "parallelism=auto"])
    console.print(
        f"parallelism=auto would take {degrees}: {seconds(layout.step_time_s)} a step predicted against "
        f"{seconds(layout.this_step_time_s)} for this layout; try it: {command}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def chosen_schedule(choice: ScheduleChoice, console: Console) -> None:
    """Which schedule `parallelism.schedule=auto` takes, and what the others would give."""
    name, layout = choice.layout.schedule, choice.layout
    others = [f"{other} {seconds(time_s)}" for other, time_s in choice.step_time_s.items() if other != name]
    against = f" against {', '.join(others)}" if others else ", the only one that runs with these degrees"
    memory = "" if choice.fits else "; no schedule is predicted to fit the memory"
    console.print(
        f"schedule=auto: {name} with vpp={layout.vpp}, {seconds(choice.step_time_s[name])} a step predicted"
        f"{against}{memory}",
        highlight=False,
        soft_wrap=True,
    )


def _kept_by_auto(word: str) -> bool:
    """Whether an override of `parallelism` also holds for a planned layout."""
    return word.lstrip("+").startswith(("parallelism.all_to_all=", "parallelism.placement="))


def measurements(rows: list[dict[str, Any]]) -> Table:
    """Measured points: time of one operation, its rate, and for exchanges the bus bandwidth as nccl-tests has it."""
    columns = Table(box=None, header_style="bold")
    columns.add_column("operator", no_wrap=True)
    for name in ("work", "unit", "median us", "p5 us", "p95 us", "rate /s", "busbw GB/s", "correct"):
        columns.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        busbw = f"{row['busbw_bytes_per_s'] / 1e9:.3g}" if "busbw_bytes_per_s" in row else ""
        times = (f"{1e6 * row[key]:,.1f}" for key in ("median_s", "p5_s", "p95_s"))
        rate = f"{row['work'] / row['median_s']:.3g}"
        columns.add_row(row["operator"], f"{row['work']:.3g}", row["unit"], *times, rate, busbw, str(row["correct"]))
    return columns
