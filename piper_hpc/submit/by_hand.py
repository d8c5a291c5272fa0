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
        "id": environ["SLURM_JOB_ID"],
        "environment": address(environ),
        "overrides": list(words),
    }


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
