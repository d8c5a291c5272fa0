"""The attempts of a run: each start of its ranks, numbered in the record, whatever job or requeue made it.

The scheduler's own count of requeues begins anew with every job, and knows nothing of a second job in the same folder.
"""

from __future__ import annotations

import random
import time
from typing import Any

from piper_hpc.runs.folder import RunFolder, utc_now
from piper_hpc.runs.status import Status

LOOK_S = 0.1
CLAIM_S = 300.0
"""How long ranks wait for their first one to number the attempt: it may come minutes later on thousands of nodes."""


def claim(run: RunFolder, key: str, job_id: str, printed_bytes: int = 0) -> int:
    """Number the attempt that `key` names; the same number where it has one. One process of the attempt calls it.

    printed_bytes: what the job's output had before it.

    Of two that call it at once with different keys each gets a number of its own: mkdir(2) is atomic on a shared file
    system too.
    """
    while True:
        known = run.attempts()
        if known and run.attempt(known[-1]).get("key") == key:
            return known[-1]
        number = known[-1] + 1 if known else 0
        if run.begin_attempt(number):
            begun = {"key": key, "job_id": job_id, "started": utc_now(), "printed_bytes": printed_bytes}
            run.write_attempt(number, begun)
            return number


def joined(run: RunFolder, key: str, ranks: int, timeout_s: float = CLAIM_S) -> int:
    """The number of the attempt that `key` names, once it is claimed. Raises RuntimeError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        for number in reversed(run.attempts()):
            if run.attempt(number).get("key") == key:
                return number
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job's first rank began no attempt in {run.logs} within {timeout_s:.0f} s")
        time.sleep(max(LOOK_S, 2 * random.random() * ranks / 1000))  # 1,000 looks a second, of all ranks together


def close(run: RunFolder, number: int, ended: Status, **facts: Any) -> None:
    """Record how an attempt ended that is not the run's last; facts: beside the status."""
    kept = {key: getattr(ended, key) for key in ("state", "failure_class", "reason", "evidence", "step")}
    run.write_attempt(number, run.attempt(number) | kept | {"ended": utc_now()} | facts)


def history(run: RunFolder) -> list[dict[str, Any]]:
    """What is known of every attempt, first one first: `attempt`, and of `attempt.json` what is there."""
    return [run.attempt(number) | {"attempt": number} for number in run.attempts()]
