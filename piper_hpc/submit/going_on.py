"""How a run goes on from inside its own job: requeued, or by a job that follows it; and what the record says then."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from piper_hpc.runs import RunFolder, Status, attempts
from piper_hpc.runs.checkpoints import Sidecar, newest
from piper_hpc.runtime import scratch
from piper_hpc.runtime.slurm import TIMEOUT_S, Answer, address, ask
from piper_hpc.submit.evidence import printed, taken_by
from piper_hpc.submit.retry import Ended, decide
from piper_hpc.submit.scheduler import nodes_down

EXCLUDE_S = 3.0
"""How long a requeued job may take to accept nodes to leave out: it must have left the ones it had."""


def steps_saved(run: RunFolder) -> int:
    """Of the newest whole checkpoint; 0 where there is none."""
    found = newest(run.checkpoints)
    return Sidecar.read(found).step if found is not None else 0


def new_steps(run: RunFolder, number: int) -> int:
    """What attempt `number`, the newest, added to the run's newest checkpoint."""
    return max(0, steps_saved(run) - int(run.attempt(number).get("from_step") or 0))


def close_before(run: RunFolder, number: int) -> None:
    """Record how the attempt before `number` ended, where nobody has: Slurm took it away, and printed why."""
    if number == 0 or "state" in run.attempt(number - 1):
        return
    status = run.status()
    causes = printed(run, number - 1).causes
    if status.ended and status.attempt == number - 1:
        ended = status
    else:
        failure_class, reason = taken_by(causes) or ("lost", "it ended without a word")
        job = run.manifest().get("job") or {}
        nodes = job.get("nodes", []) if job.get("attempt") == number - 1 else []
        if down := nodes_down(",".join(nodes), address()):
            failure_class = "node_fail"
            causes = (*causes, *(f"sinfo says that {node} is {word}" for node, word in down.items()))
        ended = Status("failed", number - 1, failure_class, reason, status.step, evidence=causes)
    attempts.close(run, number - 1, ended, new_steps=new_steps(run, number - 1))


def go_on(
    run: RunFolder, ended: Status, exclude: Sequence[str] = (), environ: Mapping[str, str] = os.environ
) -> Status:
    """Have the run's own job, which this process is part of, followed by another attempt where that is worth it, and
    write what becomes of the run: `pending`, or as it `ended`, with the reason why it does not go on.

    exclude: nodes that failed. Slurm ends this process soon after a requeue, so that the record comes first.
    """
    number, how = run.newest_attempt(), run.config()["cluster"].get("go_on", "requeue")
    here = Ended(ended.failure_class, new_steps(run, number))
    earlier = [
        Ended(each.get("failure_class"), each.get("new_steps") or 0)
        for each in attempts.history(run)
        if each["attempt"] < number
    ]
    decision = decide(earlier, here)
    if how == "off" or not decision.again:
        why = "it is not tried again: cluster.go_on=off" if how == "off" else decision.why
        return _write(run, replace(ended, reason=f"{ended.reason}; {why}"))
    attempts.close(run, number, ended, new_steps=here.new_steps, exclude=list(exclude))
    then = f"{ended.failure_class}: {ended.reason}; goes on from step {steps_saved(run)} as {decision.why}"
    pending = _write(run, Status("pending", number, None, then, ended.step))
    answer = _requeued(environ, exclude) if how == "requeue" else _followed(run, environ, exclude)
    if answer.ok:
        return pending
    return _write(run, replace(ended, reason=f"{ended.reason}; it could not be tried again: {answer.reason}"))


def _write(run: RunFolder, status: Status) -> Status:
    run.write_status(status)
    return status


def _requeued(environ: Mapping[str, str], exclude: Sequence[str]) -> Answer:
    job, where = environ["SLURM_JOB_ID"], address(environ)
    answer = ask(["scontrol", "requeue", job], where)
    if "pending execution" in answer.reason:  # Slurm has requeued it by itself meanwhile
        answer = Answer("")
    deadline = time.monotonic() + EXCLUDE_S
    while answer.ok and exclude and time.monotonic() < deadline:
        if ask(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(exclude)}"], where).ok:
            break
        time.sleep(0.3)
    return answer


def _followed(run: RunFolder, environ: Mapping[str, str], exclude: Sequence[str]) -> Answer:
    """Submit the run's script again, to start after this job."""
    scripts = sorted(run.batch.glob("*.sh"), key=lambda path: path.stat().st_mtime)
    if not scripts:
        return Answer("", f"{run.batch} has no script to submit again")
    words = ["sbatch", "--parsable", f"--dependency=afterany:{environ['SLURM_JOB_ID']}"]
    words += [f"--exclude={','.join(exclude)}"] if exclude else []
    clean = {key: value for key, value in environ.items() if not re.match(r"SLURM|SRUN_|SBATCH_|PMI", key)}
    own = clean.get("TMPDIR", "")
    if Path(own).name.startswith(scratch.PREFIX):
        # This rank's own folder ends with it; Slurm, or torch for its caches in it, would make it again for the job.
        clean = {key: value for key, value in clean.items() if not value.startswith(own)}
    command = [*words, str(scripts[-1])]
    try:
        answer = subprocess.run(
            command, env=clean | address(environ), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer("", f"sbatch: {error}")
    if answer.returncode:
        return Answer("", " ".join(answer.stderr.split()))
    job_id = answer.stdout.strip().split(";")[0]
    run.write_job({"scheduler": "slurm", "id": job_id, "environment": address(environ)})
    return Answer(job_id)
