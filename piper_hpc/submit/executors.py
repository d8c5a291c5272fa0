"""Submit a prepared run through submitit: to Slurm with our own script, or to this machine under our supervisor.

Ranks are started by `piper_hpc.worker RUN` alone: nothing is pickled. Of submitit stay the call of sbatch, the job's
id, a clean environment, and its job classes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.helpers import clean_env
from submitit.local.local import LocalExecutor, LocalJob

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder
from piper_hpc.runtime.slurm import address
from piper_hpc.submit.process import local_job
from piper_hpc.submit.script import script

WORKER, SUPERVISOR = "piper_hpc.worker", "piper_hpc.submit.supervisor"
"""Modules that are started: one on every rank of Slurm's, one as the parent of all ranks of this machine."""

Work = Callable[[str], None]
"""What each rank calls with the run's path: a function at the top of a module, passed on by its name."""


class TemplateSlurmExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, with the batch script rendered from the site's template."""

    def __init__(self, run: RunFolder, cluster: ClusterConfig, placement: Mapping[str, str]) -> None:
        super().__init__(folder=run.batch)
        self._run, self._cluster, self._placement = run, cluster, placement

    def start(self, work: Work | None) -> submitit.Job[Any]:
        """Submit; the job is Slurm's now."""
        return self._submit_command(shlex.join(worker_command(self._run, work)))

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script(self._cluster, self._run, sys.executable, command, self._placement)


class SupervisedLocalExecutor(LocalExecutor):
    """submitit's local executor, with a supervisor that ends all ranks when one dies and records why."""

    def __init__(self, run: RunFolder, ranks: int, dies_with_launcher: bool) -> None:
        super().__init__(folder=run.batch)
        self._run, self._ranks, self._dies_with_launcher = run, ranks, dies_with_launcher

    def start(self, work: Work | None) -> LocalJob[Any]:
        """Start the supervisor."""
        words = [sys.executable, "-m", SUPERVISOR, str(self._run.path), "--ranks", str(self._ranks)]
        if work is not None:
            words += ["--work", _name(work)]
        if self._dies_with_launcher:
            words += ["--dies-with-launcher", str(os.getpid())]
        with (self._run.logs / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        return LocalJob(self.folder, str(process.pid), list(range(self._ranks)), process)


def submit(
    run: RunFolder,
    cluster: ClusterConfig,
    *,
    environment: dict[str, str],
    wait: bool,
    placement: Mapping[str, str],
    work: Work | None = None,
) -> None:
    """Have every rank of a new job do the task of the run's configuration, and write the run's `job.json`.

    environment: what the scheduler's commands need; wait: a local job then ends when its launcher does; placement:
    sbatch options of cluster.placement.request; work: what ranks do in place of the task. Raises ConfigError where
    Slurm refuses the job.
    """
    run.batch.mkdir(parents=True, exist_ok=True)
    executor: TemplateSlurmExecutor | SupervisedLocalExecutor
    if cluster.scheduler == "slurm":
        executor = TemplateSlurmExecutor(run, cluster, placement)
    else:
        executor = SupervisedLocalExecutor(run, cluster.ranks_per_node, dies_with_launcher=wait)
    # An outer job's SLURM_* variables would change the binding of this one; where Slurm is, stays.
    environment = address() | environment
    with clean_env(), variables(environment | cluster.environment):
        try:
            job = executor.start(work)
        except (FailedJobError, FailedSubmissionError) as error:
            rule = f"sbatch refused the job: {' '.join(str(error).split())}"
            works = "dry_run=true, which shows what was asked for"
            raise ConfigError(Problem("cluster", cluster.name, rule, works)) from error
    if cluster.scheduler == "slurm":
        run.write_job({"scheduler": "slurm", "id": job.job_id, "environment": environment})
    else:
        run.write_job(local_job(int(job.job_id)))


@contextmanager
def variables(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the length of a `with`: what one job of a sweep is given, the next is not."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def preview(run_path: Path, cluster: ClusterConfig, placement: Mapping[str, str]) -> str:
    """What would be submitted: the batch script, or the command of the local supervisor."""
    run = RunFolder(run_path)
    if cluster.scheduler == "slurm":
        return script(cluster, run, sys.executable, shlex.join(worker_command(run)), placement)
    assigned = "".join(f"{key}={shlex.quote(value)} " for key, value in sorted(cluster.environment.items()))
    words = [sys.executable, "-m", SUPERVISOR, str(run.path), "--ranks", str(cluster.ranks_per_node)]
    return f"{assigned}{shlex.join(words)}\n"


def worker_command(run: RunFolder, work: Work | None = None) -> list[str]:
    """What srun starts on every rank."""
    return [sys.executable, "-u", "-m", WORKER, str(run.path), *([_name(work)] if work is not None else [])]


def _name(work: Work) -> str:
    """As pkgutil.resolve_name finds it again."""
    return f"{work.__module__}:{work.__qualname__}"
