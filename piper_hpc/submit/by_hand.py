"""Jobs that a user submitted: their batch script prepares the run's folder, and finds it again when requeued."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from piper_hpc.runs import RecordError, RunFolder, find
from piper_hpc.runtime.slurm import address


def job_around(words: Sequence[str] = (), environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """`job.json` for the job of Slurm that this process is part of; empty outside any. words: of the command."""
    if "SLURM_JOB_ID" not in environ:
        return {}
    return {
        "scheduler": "slurm",
        "id": array_task(environ),
        "environment": address(environ),
        "overrides": list(words),
        # A job of a pool runs many points, a step each: what is asked or cancelled of one is that of its step.
        **({"step": environ["SLURM_STEP_ID"]} if is_pool_step(environ) else {}),
    }


def array_task(environ: Mapping[str, str] = os.environ) -> str:
    """The job as Slurm's commands name it: of a task of an array `ARRAY_TASK`, under which alone it can be requeued."""
    if "SLURM_ARRAY_TASK_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def is_pool_step(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is a rank of a point that a pool runs."""
    return "SLURM_ARRAY_TASK_ID" in environ and environ.get("SLURM_STEP_ID", "").isdecimal()


def requeued(runs: Path, words: Sequence[str], environ: Mapping[str, str] = os.environ) -> RunFolder | None:
    """The run that an earlier attempt of this job prepared with the same words and did not complete.

    None in a first attempt. The words tell apart several runs of one script; not the configuration, which may hold a
    layout that was chosen by what was measured since.
    """
    if int(environ.get("SLURM_RESTART_COUNT") or 0) == 0:
        return None
    job = job_around(words, environ)
    for run in find(runs):
        with suppress(RecordError):  # somebody else's folder
            kept = run.job()
            if {key: kept.get(key) for key in job} == job and run.status().state != "completed":
                return run
    return None
