"""What a finished run is told of a better layout: only where it was measured, small, and worth another run."""

from __future__ import annotations

import io
import time
from dataclasses import replace

import pytest
from rich.console import Console

from piper_hpc import launch, planning
from piper_hpc.cli import show
from piper_hpc.cluster.machine import Machine
from piper_hpc.config import Experiment
from piper_hpc.spec import DATA_SHEET
from tests.presets import experiment
from tests.resource_model.clusters import cluster

CALIBRATION = cluster().calibration
MACHINE = Machine(rack_of_node=(0,), memory_bytes=2**30, cores=2.0)


def asked(*overrides: str) -> Experiment:
    return experiment(*overrides)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(planning, "calibration_of", lambda *_: CALIBRATION)


def layouts() -> list[Experiment]:
    splits = ("pp=1 ep=1", "pp=1 ep=2", "pp=1 ep=4", "pp=2 ep=1", "pp=4 ep=1", "pp=1 ep=1 micro_batch=8")
    return [
        asked("parallelism=single", "parallelism.micro_batch=2", *(f"parallelism.{one}" for one in split.split()))
        for split in splits
    ]


def test_the_better_layout_is_the_plans_best_and_saves_over_a_twentieth(measured):
    best = planning.plan_of(layouts()[0], MACHINE, "piper").candidates[0]
    told = [(one, planning.better_layout(one, MACHINE)) for one in layouts()]
    assert any(better is None for _, better in told) and any(better is not None for _, better in told)
    spec = planning.cluster_of(layouts()[0], MACHINE)
    for one, better in told:
        this = planning.predict(one.model, spec, one.layout, one.workload).step_time_s
        assert (better is not None) == (best.step_time_s <= 0.95 * this)
        if better is not None:
            assert better == planning.FasterLayout(best.layout, best.step_time_s, this)


def test_what_was_not_measured_or_is_large_is_not_planned_again(monkeypatch, measured):
    slow = next(one for one in layouts() if planning.better_layout(one, MACHINE) is not None)
    many = replace(slow, cluster=replace(slow.cluster, ranks_per_node=planning.MAX_RANKS + 1))
    assert planning.better_layout(many, MACHINE) is None
    monkeypatch.setattr(planning, "calibration_of", lambda *_: replace(CALIBRATION, source=DATA_SHEET))
    assert planning.better_layout(slow, MACHINE) is None
    monkeypatch.setattr(planning, "calibration_of", lambda *_: None)
    assert planning.better_layout(slow, MACHINE) is None


def test_planning_again_for_sixty_four_ranks_takes_a_moment(measured):
    large = asked(
        *("cluster=testbed", "cluster.nodes=8", "cluster.ranks_per_node=8", "parallelism=single"),
        *("train.global_batch=512", "model=small"),
    )
    machine = replace(MACHINE, rack_of_node=(0,) * 8)
    began = time.process_time()
    planning.better_layout(large, machine)
    assert time.process_time() - began < 1.0


def test_the_command_keeps_the_users_other_words():
    console = Console(file=io.StringIO(), width=80)
    slow = layouts()[0].layout
    words = ["train.steps=5", "parallelism=single", "parallelism.ep=2", "+parallelism.all_to_all=halo", "data.path=a b"]
    show.suggest_layout(planning.FasterLayout(replace(slow, pp=2, dp=4), 0.306, 0.6289), words, console)
    assert console.file.getvalue() == (
        "parallelism=auto would take pp=2 ep=1 dp=4 micro_batch=2: 306 ms a step predicted against 629 ms for this "
        "layout; try it: python -m piper_hpc.launch train.steps=5 +parallelism.all_to_all=halo 'data.path=a b' "
        "parallelism=auto\n"
    )


def test_no_failure_of_planning_hides_the_result(monkeypatch):
    def fails(*_):
        raise RuntimeError("[no] such thing")

    monkeypatch.setattr(launch, "better_layout", fails)
    console = Console(file=io.StringIO(), width=80)
    assert launch._better(layouts()[0], MACHINE, console, []) == {}
    assert console.file.getvalue() == "no other layout was planned: [no] such thing\n"
