"""From checked points to a sweep: its folder, a run for every new point, and its pools in the queue."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from piper_hpc.cluster.machine import check_submission, describe
from piper_hpc.config import ConfigError, Experiment, check_experiment
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.resolve import create_run
from piper_hpc.runs import RunFolder, new_run_id
from piper_hpc.runs.folder import utc_now
from piper_hpc.runs.manifest import provenance
from piper_hpc.runs.sweeps import SweepFolder, SweepPoint, new_name
from piper_hpc.sweep.points import Checked, code_version
from piper_hpc.sweep.pool import Left, Pool, rules_of
from piper_hpc.sweep.steps import LocalStarter
from piper_hpc.sweep.submit import POOL, Queue, queue_now, submit_array, tasks_of


@dataclass(frozen=True)
class Submitted:
    """A group's array. points: that wait for it; tasks: 0 where the queue had no room, and nothing was submitted."""

    group: int
    job_id: str
    tasks: int
    points: int


def create(
    checked: Sequence[Checked],
    points: Sequence[SweepPoint],
    experiment: Experiment,
    kind: str,
    command: Sequence[str],
) -> SweepFolder:
    """Make the sweep's folder, and a run's folder for each new point. experiment: of any point, for what all share."""
    runs, mode, who = experiment.runs, experiment.runs_mode, provenance()
    sweep = SweepFolder.create(runs, new_name(time.strftime("%Y%m%d-%H%M%S", time.gmtime())), mode)
    made: list[SweepPoint] = []
    try:
        for point in points:
            if point.state == "new":
                point = replace(point, run_id=_create_run(checked[point.index], point, sweep, mode, who))
            made.append(point)
        sweep.write_points(made)
        sweep.write_document(document_of(sweep.name, checked, made, experiment, kind, command))
    except BaseException:
        discard(sweep, made)
        raise
    return sweep


def discard(sweep: SweepFolder, points: Sequence[SweepPoint] | None = None) -> None:
    """Remove a sweep of which nothing was submitted, with its runs."""
    for point in sweep.points() if points is None else points:
        if point.state == "new" and point.run_id is not None:
            shutil.rmtree(sweep.runs / point.run_id, ignore_errors=True)
    shutil.rmtree(sweep.path, ignore_errors=True)


def _create_run(one: Checked, point: SweepPoint, sweep: SweepFolder, mode: int, who: dict[str, Any]) -> str:
    assert one.machine is not None
    of = {"name": sweep.name, "index": point.index, "axes": point.axes}
    run = RunFolder(sweep.runs / new_run_id())
    create_run(run, one.config, one.identity, one.machine, one.prediction, mode, sweep=of, known_provenance=who)
    return run.run_id


def document_of(
    name: str,
    checked: Sequence[Checked],
    points: Sequence[SweepPoint],
    experiment: Experiment,
    kind: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """`sweep.json` of the points: what they are, the groups they run in, and what they are predicted to cost."""
    groups: dict[int, Checked] = {}
    for point in points:
        if point.state == "new" and point.group is not None:
            groups.setdefault(point.group, checked[point.index])
    return {
        "name": name,
        "created": utc_now(),
        "kind": kind,
        "command": list(command),
        "axes": list(dict.fromkeys(key for point in points for key in point.axes)),
        "code": code_version(provenance()),
        "start_s": experiment.sweep.start_s,
        "stall_s": experiment.sweep.stall_s,
        "tasks": experiment.sweep.tasks if kind == "grid" else 1,
        "groups": [_group(one) for _, one in sorted(groups.items())],
        "predicted_node_hours": sum(point.node_s for point in points) / 3600,
    }


def _group(one: Checked) -> dict[str, Any]:
    assert one.cluster is not None and one.placement is not None
    cluster = one.cluster
    return {
        "cluster": cluster.name,
        "scheduler": cluster.scheduler,
        "nodes": cluster.nodes,
        "ranks_per_node": cluster.ranks_per_node,
        "time_min": cluster.time_min,
        "container": cluster.container,
        "placement": dict(one.placement),
    }


def submit(sweep: SweepFolder) -> list[Submitted]:
    """Submit an array for every group with points that nobody holds. Raises ConfigError where Slurm refuses one; those
    before it are submitted then."""
    document, submitted = sweep.document(), []
    queue: Queue | None = None
    for group, facts in enumerate(document["groups"]):
        free, _ = Left(sweep, group).look()
        if not free:
            continue
        cluster, environment = cluster_of(sweep, free[0][0])
        if queue is None:
            queue = queue_now(environment)
        points = [point for point, _ in free]
        tasks = tasks_of(points, cluster, queue, document["tasks"])
        job_id = ""
        if tasks:
            job_id = submit_array(sweep, group, cluster, facts["placement"], tasks, environment)["id"]
            queue = replace(queue, queued=queue.queued + tasks)
        submitted.append(Submitted(group, job_id, tasks, len(points)))
    return submitted


def cluster_of(sweep: SweepFolder, point: SweepPoint) -> tuple[ClusterConfig, Mapping[str, str]]:
    """The cluster of a point's run, and what the commands of its scheduler need. Raises ConfigError where it is out of
    reach from here."""
    run = sweep.run(point)
    assert run is not None
    cluster = check_experiment(run.config()).cluster
    machine = describe(cluster)
    check_submission(cluster, machine)
    return cluster, machine.environment


def first_submission(sweep: SweepFolder) -> list[Submitted]:
    """`submit` of a new sweep; where nothing could be submitted, nothing is left behind."""
    try:
        return submit(sweep)
    except ConfigError:
        if not sweep.jobs():
            discard(sweep)
        raise


def local_pool(sweep: SweepFolder, tell: Callable[[], None], log: Callable[[str], None]) -> Pool:
    """What drains a sweep of this machine, in this process."""
    return Pool(sweep, None, LocalStarter(), rules_of(sweep.document()), tell, log)


def in_background(sweep: SweepFolder) -> int:
    """Drain a sweep of this machine in a process that outlives this one; its id."""
    words = [sys.executable, "-u", "-m", POOL, str(sweep.path), "all"]
    with (sweep.logs / "pool.log").open("ab") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=Path.cwd()
        )
    return process.pid
