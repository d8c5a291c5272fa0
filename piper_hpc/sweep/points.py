"""What each point is and costs, before anything is submitted: checked, its layout settled, predicted; on all cores."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from piper_hpc.cluster.machine import Machine, describe
from piper_hpc.config import Experiment, Problem, check_experiment
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.resolve import Predictions, resolve
from piper_hpc.runs import RecordError, find
from piper_hpc.runs.manifest import git, versions
from piper_hpc.runs.sweeps import SweepPoint
from piper_hpc.spec import SpecError
from piper_hpc.train.settings import WARMUP_STEPS

START_S = {"slurm": 60.0, "local": 15.0}
"""What a point takes before its first step and after its last, by scheduler, until a job has seen it for itself."""
FEW = 8
"""Points for which no further process is worth its start."""


@dataclass(frozen=True)
class Checked:
    """One point with all that its run needs; refused ones have problems alone. config: YAML; prediction: a document;
    shape: what points of one job share, as text."""

    index: int
    problems: tuple[Problem, ...] = ()
    identity: str = ""
    config: str = ""
    prediction: dict[str, Any] | None = None
    cluster: ClusterConfig | None = None
    machine: Machine | None = None
    placement: Mapping[str, str] | None = None
    steps: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> str:
        """Nodes, ranks, environment and everything else that sbatch is told."""
        assert self.cluster is not None and self.placement is not None
        return json.dumps([asdict(self.cluster), dict(self.placement)], sort_keys=True)

    @property
    def peak_bytes(self) -> int | None:
        """Predicted, of the fullest rank."""
        return max(self.prediction["peak_memory_bytes"]) if self.prediction else None

    @property
    def total_s(self) -> float | None:
        """Predicted, with its start."""
        if self.prediction is None or self.steps is None or self.cluster is None:
            return None
        return START_S[self.cluster.scheduler] + self.steps * float(self.prediction["step_time_s"])


Compose = Callable[[int], DictConfig]


def check_all(compose: Compose, number: int) -> list[Checked]:
    """All points of a sweep, in order. compose: the configuration of a point."""
    processes = min(len(os.sched_getaffinity(0)), number // FEW)
    if processes < 2:
        return _check(compose, range(number))
    context = multiprocessing.get_context("fork")  # they inherit what Hydra has composed
    queue: Any = context.Queue()
    shares = [range(first, number, processes) for first in range(processes)]
    workers = [context.Process(target=_send, args=(queue, compose, share)) for share in shares]
    for worker in workers:
        worker.start()
    received = [queue.get() for _ in workers]
    for worker in workers:
        worker.join()
    found: list[Checked] = []
    for part in received:
        if isinstance(part, Exception):
            raise part
        found += part
    return sorted(found, key=lambda one: one.index)


def _send(queue: Any, compose: Compose, indices: Iterable[int]) -> None:
    try:
        queue.put(_check(compose, indices))
    except Exception as error:  # of no point alone: the launcher tells it
        queue.put(RuntimeError(f"{type(error).__name__}: {error}"))


def _check(compose: Compose, indices: Iterable[int]) -> list[Checked]:
    known: Predictions = {}
    machines: dict[str, Machine] = {}
    return [check(index, compose(index), machines, known) for index in indices]


def check(index: int, composed: DictConfig, machines: dict[str, Machine], known: Predictions) -> Checked:
    """One point. machines, known: what earlier points needed too."""
    try:
        experiment = check_experiment(composed)
        cluster = experiment.cluster
        key = repr(cluster)
        if key not in machines:
            machines[key] = describe(cluster)
        machine = machines[key]
        found = resolve(composed, experiment, machine, known)
    except SpecError as error:
        return Checked(index, tuple(error.problems))
    checked = Checked(
        index,
        (),
        found.identity,
        OmegaConf.to_yaml(found.composed, resolve=True),
        found.prediction.document() if found.prediction is not None else None,
        found.experiment.cluster,
        machine,
        found.placement,
        steps_of(found.experiment),
        tuple(found.notes),
    )
    problems = tuple(_infeasible(checked, found.experiment, machine))
    return Checked(index, problems) if problems else checked


def steps_of(experiment: Experiment) -> int | None:
    """How many steps a run takes; None of a micro-benchmark."""
    trained = {"train": experiment.train.steps, "profile": WARMUP_STEPS + experiment.task.profile_steps}
    return trained.get(experiment.task.name)


def _infeasible(checked: Checked, experiment: Experiment, machine: Machine) -> Iterable[Problem]:
    """What a single run would be told as a doubt, and a point is refused for: nobody looks on while it fails."""
    cluster, peak, total_s = experiment.cluster, checked.peak_bytes, checked.total_s
    if peak is not None and peak > machine.memory_bytes and experiment.sweep.refuse_memory:
        rule = f"a rank is predicted to need {peak / 2**30:.3g} GiB, and has {machine.memory_bytes / 2**30:.3g}"
        yield Problem("parallelism", _degrees(experiment), rule, "parallelism=auto, or sweep.refuse_memory=false")
    if total_s is not None and cluster.scheduler == "slurm" and total_s > 60 * cluster.time_min:
        rule = f"the point is predicted to take {total_s / 60:.0f} min with its start"
        yield Problem("cluster.time_min", cluster.time_min, rule, f"cluster.time_min={int(1.2 * total_s / 60) + 1}")


def _degrees(experiment: Experiment) -> str:
    layout = experiment.layout
    return "" if layout is None else f"pp={layout.pp} ep={layout.ep} dp={layout.dp} micro_batch={layout.micro_batch}"


@dataclass(frozen=True)
class Earlier:
    """A completed run of an identity, and the commit that ran it, with `+` where the tree differed from it."""

    run_id: str
    code: str


def code_version(manifest: Mapping[str, Any]) -> str:
    """The commit that a manifest names, with `+` behind it where the tree differed; outside a checkout the version."""
    if git := manifest.get("git"):
        return f"{git['commit'][:12]}{'+' if git['dirty'] else ''}"
    return str((manifest.get("versions") or {}).get("piper-hpc", ""))


def completed(runs: Path) -> dict[str, Earlier]:
    """The newest completed run of every identity below `runs`."""
    found = {}
    for run in find(runs):
        with suppress(RecordError, OSError, KeyError):  # somebody else's folder, or an older record
            manifest = run.manifest()
            if "identity" in manifest and run.status().state == "completed":
                found[manifest["identity"]] = Earlier(run.run_id, code_version(manifest))
    return found


def points_of(
    checked: Sequence[Checked], axes: Sequence[Mapping[str, Any]], earlier: Mapping[str, Earlier], strict_code: bool
) -> list[SweepPoint]:
    """The sweep's points: refused, done before, or new with the group that they run in.

    A point that means the same as one before it in the sweep is refused: it would be the same run. strict_code: a run
    of another version of the code, or of a tree with changes, does not count as done.
    """
    now = code_version({"git": git(), "versions": versions()})
    groups: dict[str, int] = {}
    seen: dict[str, int] = {}
    points = []
    for one in checked:
        point = SweepPoint(one.index, dict(axes[one.index]), "refused", errors=[asdict(each) for each in one.problems])
        if not one.problems and one.identity in seen:
            rule = f"means the same as point {seen[one.identity]}: what differs changes no result"
            same = asdict(Problem("sweep", " ".join(map(str, one_axes(point))), rule, "the sweep without it"))
            point = replace(point, errors=[same])
        elif not one.problems:
            seen[one.identity] = one.index
            point = _feasible(one, point, groups, earlier.get(one.identity), now, strict_code)
        points.append(point)
    return points


def one_axes(point: SweepPoint) -> list[str]:
    """`key=value` of what was swept."""
    return [f"{key}={value}" for key, value in point.axes.items()]


def _feasible(
    one: Checked, point: SweepPoint, groups: dict[str, int], before: Earlier | None, now: str, strict_code: bool
) -> SweepPoint:
    assert one.cluster is not None and one.machine is not None
    point = replace(
        point,
        identity=one.identity,
        nodes=one.cluster.nodes,
        ranks=one.cluster.nodes * one.cluster.ranks_per_node,
        steps=one.steps,
        step_time_s=one.prediction["step_time_s"] if one.prediction else None,
        total_s=one.total_s,
        peak_bytes=one.peak_bytes,
        limit_bytes=one.machine.memory_bytes,
    )
    is_same = before is None or (before.code == now and not now.endswith("+"))
    other = None if before is None or is_same else before.code or "unknown"
    if before is not None and not (strict_code and other):
        return replace(point, state="done", run_id=before.run_id, other_code=other)
    return replace(point, state="new", group=groups.setdefault(one.shape, len(groups)))
