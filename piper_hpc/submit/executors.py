"""Submit a prepared run through submitit: to Slurm with our own script, or to this machine under our supervisor."""

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
from piper_hpc.submit.process import local_job
from piper_hpc.submit.script import script


class TemplateSlurmExecutor(submitit.SlurmExecutor):
    """submitit's Slurm executor, with the batch script rendered from the site's template."""

    def __init__(self, run: RunFolder, cluster: ClusterConfig, placement: Mapping[str, str]) -> None:
        super().__init__(folder=run.submitit)
        self._run, self._cluster, self._placement = run, cluster, placement

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return script(self._cluster, self._run, sys.executable, command, self._placement)


class SupervisedLocalExecutor(LocalExecutor):
    """submitit's local executor, with a supervisor that ends all ranks when one dies and records why."""

    def __init__(self, run: RunFolder, dies_with_launcher: bool) -> None:
        super().__init__(folder=run.submitit, max_num_timeout=0)
        self._run, self._dies_with_launcher = run, dies_with_launcher

    def _submit_command(self, command: str) -> LocalJob[Any]:
        tasks = self.parameters["tasks_per_node"]
        options = ["--ranks", str(tasks)]
        if self._dies_with_launcher:
            options += ["--dies-with-launcher", str(os.getpid())]
        with (self._run.logs / "supervisor.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "piper_hpc.submit.supervisor",
                    str(self._run.path),
                    *options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return LocalJob(self.folder, str(process.pid), list(range(tasks)), process)


def submit(
    work: Callable[[str], None],
    run: RunFolder,
    cluster: ClusterConfig,
    *,
    environment: dict[str, str],
    wait: bool,
    placement: Mapping[str, str],
) -> None:
    """Have every rank of a new job call `work` with the run's path, and write the run's `job.json`.

    work: an importable function, so that only its name is pickled; environment: what the scheduler's commands need;
    wait: a local job then ends when its launcher does; placement: sbatch options of cluster.placement.request. Raises
    ConfigError where Slurm refuses the job.
    """
    run.logs.mkdir(exist_ok=True)
    executor: submitit.SlurmExecutor | LocalExecutor
    if cluster.scheduler == "slurm":
        executor = TemplateSlurmExecutor(run, cluster, placement)
        executor.update_parameters(nodes=cluster.nodes, ntasks_per_node=cluster.ranks_per_node, time=cluster.time_min)
    else:
        executor = SupervisedLocalExecutor(run, dies_with_launcher=wait)
        executor.update_parameters(tasks_per_node=cluster.nodes * cluster.ranks_per_node)
    # An outer job's SLURM_* variables would change the binding of this one.
    with clean_env(), _variables(environment | cluster.environment):
        try:
            job = executor.submit(work, str(run.path))
        except (FailedJobError, FailedSubmissionError) as error:
            rule = f"sbatch refused the job: {' '.join(str(error).split())}"
            works = "dry_run=true, which shows what was asked for"
            raise ConfigError(Problem("cluster", cluster.name, rule, works)) from error
    if cluster.scheduler == "slurm":
        run.write_job({"scheduler": "slurm", "id": job.job_id, "environment": environment})
    else:
        run.write_job(local_job(int(job.job_id)))


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
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
        command = f"{sys.executable} -u -m submitit.core._submit {run.submitit}"
        return script(cluster, run, sys.executable, command, placement)
    variables = "".join(f"{key}={shlex.quote(value)} " for key, value in sorted(cluster.environment.items()))
    return f"{variables}{sys.executable} -m piper_hpc.submit.supervisor {run.path} --ranks {cluster.ranks_per_node}\n"
