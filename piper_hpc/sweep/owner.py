"""Who holds a point: a task of a job array, or a process of this machine; and whether it is still there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import psutil

from piper_hpc.runtime.slurm import address
from piper_hpc.submit.by_hand import array_task
from piper_hpc.submit.scheduler import RUNNING, JobState, job_states

Owner = dict[str, Any]
"""`scheduler`, `id`, `restart` (of Slurm, how often it was requeued), `started_s` (of a process), `host`,
`environment` (of the scheduler's commands), and `time_s`, when it took the point."""


def this_process(environ: Mapping[str, str] = os.environ) -> Owner:
    """The owner that this process is."""
    owner: Owner = {"host": platform.node(), "time_s": time.time(), "environment": address(environ)}
    if "SLURM_ARRAY_TASK_ID" in environ:
        restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
        return owner | {"scheduler": "slurm", "id": array_task(environ), "restart": restart}
    started_s = psutil.Process().create_time()
    return owner | {"scheduler": "local", "id": str(os.getpid()), "started_s": started_s}


def gone(owners: Iterable[Owner], me: Owner | None = None) -> list[bool]:
    """Of each owner whether it surely holds its point no more; one of whom nothing can be learnt still does.

    me: an owner whose own earlier life, before Slurm requeued it, is over.
    """
    owners = list(owners)
    asked: dict[tuple[tuple[str, str], ...], set[str]] = {}
    for owner in owners:
        if owner["scheduler"] == "slurm" and not _same_job(owner, me):
            asked.setdefault(tuple(sorted(owner["environment"].items())), set()).add(owner["id"])
    states: dict[str, JobState] = {}
    for environment, ids in asked.items():
        states |= job_states(sorted(ids), dict(environment))
    return [_is_gone(owner, me, states) for owner in owners]


def _is_gone(owner: Owner, me: Owner | None, states: Mapping[str, JobState]) -> bool:
    if owner["scheduler"] == "local":
        return owner["host"] == platform.node() and not _runs(owner)
    if me is not None and _same_job(owner, me):
        return bool(owner["restart"] < me["restart"])
    said = states.get(owner["id"])
    # One that waits was requeued: it takes its points up again, unless another is faster.
    return said is not None and said.word not in RUNNING


def _same_job(owner: Owner, me: Owner | None) -> bool:
    return me is not None and (owner["scheduler"], owner["id"]) == (me["scheduler"], me["id"])


def _runs(owner: Owner) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(int(owner["id"]))
        return bool(process.create_time() == owner["started_s"] and process.status() != psutil.STATUS_ZOMBIE)
    return False
