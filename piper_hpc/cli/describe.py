"""One run's state as a JSON document: its record, what its scheduler says of it now, and when it will end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TypeVar

from piper_hpc.cli.eta import eta, span
from piper_hpc.runs import ADVICE, RecordError, RunFolder, Status, attempts
from piper_hpc.submit.outcome import observe, observe_all
from piper_hpc.submit.scheduler import PENDING, JobState, QueuePlace, queue_place
from piper_hpc.train.settings import WARMUP_STEPS

T = TypeVar("T")


def describe(run: RunFolder, jobs: Mapping[str, JobState] | None = None) -> dict[str, Any]:
    """One run's state, as the scheduler sees it now, with its last step.

    jobs: what Slurm says of jobs, where it was asked for many at once; the place in the queue is not asked for then.
    What a torn, foreign or half-written folder does not tell is null, and `problem` says why; else `problem` is null.
    """
    problems: list[str] = []

    def known(read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except RecordError as error:
            problems.append(error.reason)
        except OSError as error:  # somebody else's folder
            problems.append(str(error))
        return otherwise

    # The manifest, which `find` goes by, names the task where there is no configuration: studies have none.
    nothing: dict[str, Any] = {}
    asked = observe_all([run]) if jobs is None else jobs
    manifest, config = known(run.manifest, nothing), known(run.config, nothing)
    status = known(lambda: asdict(observe(run, asked)), dict.fromkeys(Status.__dataclass_fields__))
    job = known(run.job, nothing)
    rows: list[dict[str, Any]] = known(run.metrics, [])
    no_attempts: list[dict[str, Any]] = []

    def at(group: str, key: str) -> Any:
        found = config.get(group)
        if isinstance(found, dict) and key in found:
            return found[key]
        if config:
            problems.append(f"config.yaml has no {group}.{key}")
        return None

    task = at("task", "name") or manifest.get("task")
    steps = at("task", "profile_steps") if task == "profile" else at("train", "steps")
    if isinstance(steps, int) and task == "profile":
        steps += WARMUP_STEPS
    step = rows[-1].get("step") if rows else None
    if rows and not isinstance(step, int):
        problems.append("metrics.jsonl: its last row has no step")
    last = None
    if isinstance(step, int):
        last = {"step": step} | {key: rows[-1].get(key) for key in ("loss", "tokens_per_s", "mfu")}
    said = asked.get(job["id"]) if job.get("scheduler") == "slurm" else None
    waits = said is not None and said.word in PENDING
    place = queue_place(job["id"], job["environment"]) if waits and jobs is None else None
    trains = task in ("train", "profile") and isinstance(steps, int)
    done = step + 1 if isinstance(step, int) else _resumed(manifest)
    predicted = known(lambda: run.prediction() or nothing, nothing) if trains and not rows else nothing
    expected = eta(status["state"], steps - done if trains else None, rows, predicted, said, time.time())
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "task": task,
        "model": at("model", "name"),
        "cluster": at("cluster", "name"),
        "job": {"scheduler": job.get("scheduler"), "id": job.get("id")},
        "status": status,
        "queue": queue(said, place),
        "advice": ADVICE[status["failure_class"]].replace("RUN", run.run_id) if status["failure_class"] else None,
        "attempts": known(lambda: attempts.history(run), no_attempts),
        "steps": steps,
        "steps_done": step + 1 if isinstance(step, int) else 0,
        "last": last,
        "eta_s": expected.seconds if expected else None,
        "eta_from": expected.source if expected else None,
        "time_left_s": said.left_s if said else None,
        "problem": "; ".join(dict.fromkeys(problems)) or None,
    }


def queue(said: JobState | None, place: QueuePlace | None = None) -> dict[str, Any]:
    """Slurm's word for a job that has not ended, and of one that waits the reason, the expected start, in UTC, and its
    place among those that wait."""
    waits = said is not None and said.word in PENDING
    start_s = said.start_s if said is not None and waits else None
    starts = None if start_s is None else datetime.fromtimestamp(start_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "state": said.word if said is not None else None,
        "reason": (said.reason or None) if said is not None and waits else None,
        "expected_start": starts,
        "place": place.place if place is not None else None,
        "of": place.of if place is not None else None,
    }


def waiting(document: Mapping[str, Any]) -> str:
    """Why and for how long a job waits, in words; empty where Slurm does not say."""
    told = [document["reason"]] if document["reason"] else []
    if document["place"]:
        told.append(f"{document['place']} of {document['of']} that wait for its partition")
    if document["expected_start"]:
        starts = datetime.strptime(document["expected_start"], "%Y-%m-%dT%H:%M:%S%z")
        wait_s = max(0.0, starts.timestamp() - time.time())
        told.append(f"expected to start at {starts.astimezone():%Y-%m-%d %H:%M}, in {span(wait_s)}")
    return ", ".join(told)


def _resumed(manifest: Mapping[str, Any]) -> int:
    """Steps that the checkpoint had which the run went on from."""
    job = manifest.get("job")
    resumed = job.get("resumed") if isinstance(job, dict) else None
    step = resumed.get("step") if isinstance(resumed, dict) else None
    return step if isinstance(step, int) else 0
