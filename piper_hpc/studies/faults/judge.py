"""What became of a training that was hurt, held against the undisturbed one."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from piper_hpc.studies.faults.inject import FAULTS, ends_as
from piper_hpc.studies.faults.scene import TWO_NODES, Missed, Scene
from piper_hpc.testbed.state import Testbed

Losses = Mapping[int, tuple[Any, Any]]


@dataclass(frozen=True)
class Row:
    """One fault: when and what was hurt, how the attempts ended, what was trained twice, and what is wrong, if
    anything."""

    seed: int
    fault: str
    moment: str
    classes: list[str]
    attempts: int
    repeated_steps: int
    seconds: float
    problem: str | None = None


def kind_of(seed: int) -> str:
    """The fault that a seed means: they take turns."""
    names = list(FAULTS)
    return names[seed % len(names)]


def undisturbed(testbed: Testbed, runs: Path, steps: int) -> Losses:
    """Losses of a training that nothing happens to. Raises Missed where it does not complete."""
    scene = Scene(testbed, runs, random.Random(0))
    scene.start(*TWO_NODES, f"train.steps={steps}")
    status = scene.end()
    if status.state != "completed":
        raise Missed(f"the undisturbed training {status.state}: {status.reason}")
    return scene.losses()


def try_one(testbed: Testbed, runs: Path, seed: int, reference: Losses) -> Row:
    """Hurt one training as the seed says, and judge it."""
    name, draw, began_s = kind_of(seed), random.Random(seed), time.monotonic()
    fault, scene, moment, problem = FAULTS[name], Scene(testbed, runs / f"seed-{seed}", draw), "", None
    try:
        moment = fault.hurt(scene)
        status = ends_as(fault, scene)
        problem = _wrong(name, scene, status.state, reference)
    except Missed as missed:
        problem = str(missed)
    known = hasattr(scene, "run") and scene.run.path.exists()
    row = Row(
        seed=seed,
        fault=name,
        moment=moment,
        classes=scene.classes() if known else [],
        attempts=len(scene.run.attempts()) if known else 0,
        repeated_steps=scene.repeated() if known else 0,
        seconds=round(time.monotonic() - began_s, 1),
        problem=problem,
    )
    if known and problem is not None:
        scene.slurm("scancel", "--signal=KILL", "--full", scene.job)
        scene.slurm("scancel", scene.job)
    return row


def _wrong(name: str, scene: Scene, state: str, reference: Losses) -> str | None:
    """The first thing that is not as it must be."""
    fault, losses = FAULTS[name], scene.losses()
    classes = scene.classes()
    if state != "completed":
        return f"it {state}: {scene.run.status().failure_class}: {scene.run.status().reason}"
    if fault.classes and (len(classes) < 2 or classes[0] not in fault.classes):
        return f"its first attempt ended as {classes[0]}, not as {' or '.join(fault.classes)}"
    if not fault.classes and classes != ["completed"]:
        return f"it was disturbed: {classes}"
    if sorted(losses) != list(range(fault.steps)):
        return f"{fault.steps - len(losses)} of {fault.steps} steps are missing"
    differ = [step for step, found in losses.items() if found != reference[step]]
    if differ:
        return f"loss of step {differ[0]} and {len(differ) - 1} more is another than undisturbed"
    if scene.repeated() > fault.repeats:
        return f"{scene.repeated()} steps were trained twice, more than {fault.repeats}"
    left = scene.left_over()
    return f"left over: {', '.join(left[:4])}" if left else None
