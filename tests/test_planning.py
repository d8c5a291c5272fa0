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
from piper_hpc.config import ConfigError, Experiment
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
    splits += ("pp=2 vpp=2 ep=1 schedule=zbv micro_batch=4",)
    return [
        asked("parallelism=single", "parallelism.micro_batch=2", *(f"parallelism.{one}" for one in split.split()))
        for split in splits
    ]


@pytest.mark.slow
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


def deep(*overrides: str) -> Experiment:
    return asked("parallelism=single", "parallelism.schedule=auto", "parallelism.pp=4", "model.layers=8", *overrides)


def test_the_schedule_that_is_chosen_has_the_shortest_step_of_those_that_run(measured):
    one = deep("train.global_batch=16")
    choice, where = planning.schedule_of(one, MACHINE), planning.cluster_of(one, MACHINE)
    steps = {}
    for schedule, vpp in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb_h1", 1), ("zbv", 2), ("dualpipev", 2)):
        layout = replace(one.layout, schedule=schedule, vpp=vpp)
        steps[schedule] = planning.predict(one.model, where, layout, one.workload).step_time_s
    assert choice.step_time_s == steps and choice.fits
    assert list(choice.step_time_s) == sorted(steps, key=steps.__getitem__)
    assert choice.layout == replace(
        one.layout, schedule=min(steps, key=steps.__getitem__), vpp=choice.layout.vpp
    ) and choice.layout.vpp in (1, 2)


def test_only_schedules_that_run_and_fit_are_compared(measured):
    # Two micro-batches of sixteen sequences: neither a multiple of pp = 4 nor twice as many.
    few = planning.schedule_of(deep("train.global_batch=4"), MACHINE)
    assert set(few.step_time_s) == {"gpipe", "1f1b", "zb_h1", "zbv"}
    again = planning.schedule_of(deep("train.global_batch=4", "parallelism.recompute=full"), MACHINE)
    assert set(again.step_time_s) == {"gpipe", "1f1b"}
    uneven = planning.schedule_of(deep("train.global_batch=16", "parallelism.stage_layers=[3,2,2,1]"), MACHINE)
    assert uneven.layout.stage_layers == (3, 2, 2, 1) and set(uneven.step_time_s) == {"gpipe", "1f1b", "zb_h1"}
    three = planning.schedule_of(deep("train.global_batch=16", "parallelism.vpp=3", "model.layers=12"), MACHINE)
    assert list(three.step_time_s) == ["interleaved"] and three.layout.vpp == 3


def test_a_schedule_that_does_not_fit_is_taken_only_where_none_does(measured):
    one = deep("train.global_batch=64")
    roomy = planning.schedule_of(one, MACHINE)
    spec = planning.cluster_of(one, MACHINE)
    peaks = {
        schedule: max(
            planning.predict(one.model, spec, replace(one.layout, schedule=schedule), one.workload).peak_memory_bytes
        )
        for schedule in ("gpipe", "1f1b")
    }
    assert peaks["1f1b"] < peaks["gpipe"]
    tight = planning.schedule_of(one, replace(MACHINE, memory_bytes=peaks["gpipe"] - 1))
    assert tight.fits and "gpipe" in roomy.step_time_s and "gpipe" not in tight.step_time_s
    none = planning.schedule_of(one, replace(MACHINE, memory_bytes=4))
    assert not none.fits and none.layout == roomy.layout


def test_nothing_runs_where_no_schedule_does(measured):
    with pytest.raises(ConfigError, match=r"parallelism.vpp=1"):
        planning.schedule_of(deep("train.global_batch=16", "parallelism.vpp=3", "parallelism.recompute=full",
                                  "parallelism.micro_batch=2", "model.layers=8"), MACHINE)  # fmt: skip


def test_a_choice_is_told_with_what_it_was_against():
    console = Console(file=io.StringIO(), width=80)
    layout = replace(layouts()[0].layout, pp=4, schedule="zbv", vpp=2)
    show.chosen_schedule(planning.ScheduleChoice(layout, {"zbv": 0.2, "1f1b": 0.25}, fits=True), console)
    show.chosen_schedule(planning.ScheduleChoice(layout, {"zbv": 0.2}, fits=False), console)
    assert console.file.getvalue().splitlines() == [
        "schedule=auto: zbv with vpp=2, 200 ms a step predicted against 1f1b 250 ms",
        "schedule=auto: zbv with vpp=2, 200 ms a step predicted, the only one that runs with these degrees; "
        "no schedule is predicted to fit the memory",
    ]


def test_planning_again_for_sixty_four_ranks_takes_a_moment(measured):
    large = asked(
        *("cluster=testbed", "cluster.nodes=8", "cluster.ranks_per_node=8", "parallelism=single"),
        *("train.global_batch=512", "model=small"),
    )
    machine = replace(MACHINE, rack_of_node=(0,) * 8)
    began = time.process_time()
    planning.better_layout(large, machine)
    assert time.process_time() - began < 4.0  # every axis that trains: tens of thousands of layouts


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


def test_imbalance_is_priced_with_and_without_migration(measured):
    one = asked("parallelism=single", "parallelism.micro_batch=2", "plan.axes.ep=[4]", "plan.axes.pp=[1]")
    found = planning.plan_of(one, MACHINE, "piper")
    price = planning.balance_of(found, one, MACHINE)
    assert price.assumed and price.skew == planning.ASSUMED_SKEW
    assert found.candidates[0].step_time_s <= price.evened_step_time_s * (1 + 1e-9) < price.step_time_s
    skewed = asked(*("parallelism=single", "plan.axes.ep=[4]", "plan.axes.pp=[1]"), "train.routing.skew=3")
    told = planning.balance_of(planning.plan_of(skewed, MACHINE, "piper"), skewed, MACHINE)
    assert (told.assumed, told.skew) == (False, 3.0) and told.step_time_s > price.step_time_s
    whole = asked("parallelism=single", "plan.axes.ep=[1]", "plan.axes.pp=[1]")
    assert planning.balance_of(planning.plan_of(whole, MACHINE, "piper"), whole, MACHINE) is None
