"""Puts a sweep's pools into the queue: one job array for each group of points that share a shape."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder
from piper_hpc.runs.sweeps import SweepFolder, SweepPoint
from piper_hpc.runtime.slurm import address, ask
from piper_hpc.submit.executors import variables
from piper_hpc.submit.script import pool_script

POOL = "piper_hpc.sweep.pool"
FILLED = 0.8
"""Share of a job's time that points fill: the last one that fits leaves a rest."""
MOST_TASKS = 1000
"""Slurm's default MaxArraySize is 1001, one more than tasks that an array may have."""


@dataclass(frozen=True)
class Queue:
    """What the queue holds of this user, and the largest array that Slurm takes."""

    queued: int = 0
    most_tasks: int = MOST_TASKS


def queue_now(environment: Mapping[str, str]) -> Queue:
    """As Slurm says; where it does not answer, nothing is queued."""
    mine = ask(["squeue", "--me", "--array", "--noheader", "--format", "%i"], environment)
    said = ask(["scontrol", "show", "config"], environment)
    size = re.search(r"^MaxArraySize\s*=\s*(\d+)", said.text, re.MULTILINE)
    return Queue(len(mine.text.split()), int(size[1]) - 1 if size else MOST_TASKS)


def tasks_of(points: Sequence[SweepPoint], cluster: ClusterConfig, queue: Queue, most: int | None) -> int:
    """How many tasks a group's array has; 0 where the site's limit leaves none.

    As many as may run at once (`cluster.jobs_running`; one a point where no limit is known), or where their time is not
    enough as many as the points need, within what the queue takes. most: `sweep.tasks`.
    """
    limit_s = FILLED * 60 * cluster.time_min
    needed = math.ceil(sum(point.total_s or 0.0 for point in points) / limit_s)
    wanted = len(points) if cluster.jobs_running is None else max(cluster.jobs_running, needed)
    room = queue.most_tasks if cluster.jobs_queued is None else cluster.jobs_queued - queue.queued
    return max(0, min(len(points), wanted, room, queue.most_tasks, most or wanted))


class _ArrayExecutor(submitit.SlurmExecutor):
    """submitit's call of sbatch, with our script."""

    def __init__(self, folder: RunFolder, text: str) -> None:
        super().__init__(folder=folder.batch)
        self._text = text

    def start(self) -> str:
        """Submit; the array's id."""
        return str(self._submit_command("").job_id)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text


def array_script(
    sweep: SweepFolder, group: int, cluster: ClusterConfig, placement: Mapping[str, str], tasks: int
) -> str:
    """The batch script of a group's array."""
    folder = RunFolder(sweep.path)
    command = shlex.join([sys.executable, "-u", "-m", POOL, str(sweep.path), str(group)])
    return pool_script(cluster, folder, sys.executable, command, tasks, placement)


def submit_array(
    sweep: SweepFolder,
    group: int,
    cluster: ClusterConfig,
    placement: Mapping[str, str],
    tasks: int,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Submit a group's array and add it to the sweep's `jobs.jsonl`. Raises ConfigError where Slurm refuses it."""
    text = array_script(sweep, group, cluster, placement, tasks)
    folder = RunFolder(sweep.path)
    folder.batch.mkdir(parents=True, exist_ok=True)
    # An outer job's SLURM_* variables would change the binding of this one; where Slurm is, stays.
    reached = {**address(), **environment}
    with clean_env(), variables(reached | cluster.environment), folder.own_umask():
        try:
            job_id = _ArrayExecutor(folder, text).start()
        except (FailedJobError, FailedSubmissionError) as error:
            rule = f"sbatch refused the array: {' '.join(str(error).split())}"
            works = "dry_run=true, which shows what was asked for"
            raise ConfigError(Problem("cluster", cluster.name, rule, works)) from error
    row = {"group": group, "id": job_id, "tasks": tasks, "environment": reached}
    sweep.append_job(row)
    return row
