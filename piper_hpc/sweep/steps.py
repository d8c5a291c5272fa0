"""A point as it runs: a step of a pool's job, started as the site's template starts ranks, or ranks of this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from piper_hpc.cluster.machine import describe
from piper_hpc.config import check_experiment
from piper_hpc.runs import RunFolder
from piper_hpc.runtime.slurm import ask
from piper_hpc.submit.executors import submit, worker_command
from piper_hpc.submit.outcome import cancel, observe
from piper_hpc.submit.scheduler import RUNNING, job_states

STEP = "PIPER_STEP"
"""The words before a rank's command, exported by the batch script, see piper_hpc.submit.script.pool_script."""
KILL_S = 20.0
"""How long a step that was killed may take to be gone."""
STOP_S = 3.0
"""How long after a step's end its job may take to say that it is itself being stopped."""


class Step(Protocol):
    """A point that was started."""

    def ended(self) -> bool:
        """Whether all its ranks are gone."""

    def kill(self) -> None:
        """End it whatever it does, and wait until it has."""


class Starter(Protocol):
    """How this process starts points, and how long it may."""

    def start(self, run: RunFolder) -> Step:
        """Start a run's ranks."""

    def left_s(self) -> float | None:
        """Seconds until this process is ended; None where nobody will, or nobody says."""

    def is_ending(self) -> bool:
        """Whether whoever gave this process its nodes is taking them back, asked after a step ended early."""


class SlurmStep:
    """One srun of an allocation."""

    def __init__(self, command: str, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._srun = subprocess.Popen(["bash", "-c", f"exec {command}"], stdin=subprocess.DEVNULL)

    def ended(self) -> bool:
        """Whether srun has ended."""
        return self._srun.poll() is not None

    def kill(self) -> None:
        """SIGKILL to every rank, as a stopped or stuck one hears nothing else."""
        job = self._environ["SLURM_JOB_ID"]
        steps = ask(["squeue", "--noheader", "--steps", "--jobs", job, "--format", "%i"], {})
        for name in steps.text.split():
            number = name.rpartition(".")[2]
            if number.isdecimal():
                ask(["scancel", "--signal=KILL", f"{job}.{number}"], {})
        for stop in (self._srun.terminate, self._srun.kill):
            with suppress(subprocess.TimeoutExpired):
                self._srun.wait(KILL_S)
                return
            stop()
        self._srun.wait()


class SlurmStarter:
    """Steps of the job that this process is in. container: words before a rank's command."""

    def __init__(self, container: str | None, owner_id: str, environ: Mapping[str, str] = os.environ) -> None:
        self._container, self._id, self._environ = container, owner_id, environ

    def start(self, run: RunFolder) -> Step:
        """One srun over all nodes of the job."""
        command = shlex.join(worker_command(run))
        contained = f"{self._container} {command}" if self._container else command
        return SlurmStep(f"{self._environ[STEP]} {contained}", self._environ)

    def left_s(self) -> float | None:
        """Of the job's time limit."""
        said = job_states([self._id], {}).get(self._id)
        return said.left_s if said is not None else None

    def is_ending(self) -> bool:
        """Whether Slurm says that the job runs no more."""
        time.sleep(STOP_S)
        said = job_states([self._id], {}).get(self._id)
        return said is not None and (said.word not in RUNNING or said.word == "COMPLETING")


class LocalStep:
    """Ranks of this machine, with a supervisor of their own."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def ended(self) -> bool:
        """Whether the record says so, or the supervisor is gone."""
        return observe(self._run).ended

    def kill(self) -> None:
        """Have the supervisor end all ranks."""
        cancel(self._run)


class LocalStarter:
    """Ranks under a supervisor that ends with this process."""

    def start(self, run: RunFolder) -> Step:
        """Start the run's supervisor."""
        experiment = check_experiment(run.config())
        machine = describe(experiment.cluster)
        with run.own_umask():
            submit(run, experiment.cluster, environment=machine.environment, wait=True, placement={})
        return LocalStep(run)

    def left_s(self) -> float | None:
        """Nobody ends this process."""
        return None

    def is_ending(self) -> bool:
        """Nobody takes this machine back."""
        return False
