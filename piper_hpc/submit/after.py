"""`python -m piper_hpc.submit.after RUN`: the end of a batch script, which its EXIT trap calls.

Where the ranks ended without a word of their own, it says how, and has the run go on where that is worth it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence

from piper_hpc.runs import RunFolder, Status
from piper_hpc.runtime.slurm import address
from piper_hpc.submit.going_on import go_on
from piper_hpc.submit.outcome import failure_status
from piper_hpc.submit.scheduler import JobFacts, job_facts, nodes_down

CONTROLLER_S = 300.0
WORD_S = 5.0
"""How long words of failed ranks may take from their nodes to here."""


def after(run: RunFolder, environ: Mapping[str, str] = os.environ) -> Status:
    """What became of the run in this job."""
    status, number = run.status(), run.newest_attempt()
    said_already = status.attempt >= number and (status.ended or status.state == "pending")
    if said_already or (said := _answer(environ)) is None:
        return status
    if said.reason == "TimeLimit":
        reason = "the time limit ended the job before it could save and leave"
        return go_on(run, Status("failed", number, "timeout", reason, status.step), environ=environ)
    if said.state != "RUNNING":  # cancelled, or requeued by Slurm: its word stands
        return status
    deadline = time.monotonic() + WORD_S
    while (ended := failure_status(run, status)).failure_class == "lost" and time.monotonic() < deadline:
        time.sleep(0.2)
    down = nodes_down(said.nodes, address(environ))
    if down and ended.failure_class in ("comm", "hang", "killed", "lost", "rendezvous"):
        evidence = (*ended.evidence, *(f"sinfo says that {node} is {state}" for node, state in down.items()))
        reason = f"node {', '.join(down)} failed ({ended.reason})"
        ended = Status("failed", number, "node_fail", reason, ended.step, evidence=evidence)
    return go_on(run, ended, exclude=list(down), environ=environ)


def _answer(environ: Mapping[str, str]) -> JobFacts | None:
    """What the controller says of this job: it may be restarting, or this node may be cut off from it for a while."""
    deadline = time.monotonic() + CONTROLLER_S
    while (said := job_facts(environ["SLURM_JOB_ID"], address(environ))) is None and time.monotonic() < deadline:
        time.sleep(1.0)
    return said


def main(arguments: Sequence[str]) -> int:
    """The command; its exit code is the batch script's own affair."""
    run = RunFolder(arguments[0])
    run.take_umask()
    status = after(run)
    print(f"run {run.run_id}: {status.state} {status.failure_class or ''} {status.reason or ''}".rstrip(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
