"""Which points run, which are done, and which are refused; what they are told to cost."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from piper_hpc.cli import sweep as show
from piper_hpc.cluster.machine import Machine
from piper_hpc.config import Problem
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder, Status
from piper_hpc.sweep import points
from piper_hpc.sweep.points import Checked, Earlier, completed, points_of
from tests.finished_run import make_run, prediction

CLUSTER = ClusterConfig(name="site", scheduler="slurm", nodes=4, ranks_per_node=8, time_min=60)
MACHINE = Machine((0,) * 4, 3000, 0.0)


def good(index: int, identity: str, **other: object) -> Checked:
    cluster = replace(CLUSTER, **other)  # type: ignore[arg-type]
    return Checked(index, (), identity, "", prediction(), cluster, MACHINE, {}, steps=100)


@pytest.fixture(autouse=True)
def this_code(monkeypatch):
    monkeypatch.setattr(points, "git", lambda: {"commit": "a" * 40, "dirty": False})


def test_points_are_new_done_refused_or_the_same_as_another():
    broken = Problem("train.seed", -1, "must not be negative", "train.seed=0")
    checked = [good(0, "x"), good(1, "y", nodes=8), good(2, "x"), Checked(3, (broken,)), good(4, "z"), good(5, "w")]
    earlier = {"z": Earlier("run-z", "a" * 12), "w": Earlier("run-w", "b" * 12)}
    axes = [{"train.seed": index} for index in range(6)]
    made = points_of(checked, axes, earlier, False)
    assert [point.state for point in made] == ["new", "new", "refused", "refused", "done", "done"]
    assert [point.group for point in made] == [0, 1, None, None, None, None]
    assert "means the same as point 0" in made[2].errors[0]["rule"]
    assert made[3].errors[0]["works"] == "train.seed=0"
    assert (made[4].run_id, made[4].other_code, made[5].other_code) == ("run-z", None, "b" * 12)
    again = points_of(checked, axes, earlier, True)
    assert [point.state for point in again[4:]] == ["done", "new"]
    assert made[0].total_s == pytest.approx(60 + 100 * prediction()["step_time_s"])
    assert made[0].node_s == pytest.approx(4 * (made[0].total_s or 0))


def test_a_tree_with_changes_is_other_code_whatever_its_commit(monkeypatch):
    monkeypatch.setattr(points, "git", lambda: {"commit": "a" * 40, "dirty": True})
    (made,) = points_of([good(0, "x")], [{}], {"x": Earlier("run-x", "a" * 12 + "+")}, False)
    assert made.other_code == "a" * 12 + "+"


def test_completed_runs_are_found_by_what_they_mean(tmp_path: Path):
    for name, state in (("x", "completed"), ("y", "failed")):
        run = make_run(tmp_path, [], None)
        run.write_manifest(run.manifest() | {"identity": name, "git": {"commit": "c" * 40, "dirty": False}})
        run.write_status(Status(state))
    make_run(tmp_path, [], None)  # an older record has no identity
    RunFolder.create(tmp_path).write_config("")
    found = completed(tmp_path)
    assert list(found) == ["x"] and found["x"].code == "c" * 12


def test_a_sweep_says_what_it_is_before_it_costs_anything():
    broken = Problem("parallelism.pp", 3, "must divide the layers", "parallelism.pp=2")
    checked = [*(good(index, str(index)) for index in range(3)), *(Checked(index, (broken,)) for index in range(3, 15))]
    made = points_of(checked, [{"a": index} for index in range(15)], {"0": Earlier("r", "b" * 12)}, False)
    text = StringIO()
    groups = [{"nodes": 4, "ranks_per_node": 8, "cluster": "site"}]
    show.show_points(made, {"axes": ["a"], "groups": groups}, Console(file=text, width=200))
    said = text.getvalue()
    assert "15 points over a" in said and "2 to run on 4 x 8 ranks of site" in said
    assert f"1 done before, of them 1 by other code ({'b' * 12}); sweep.strict_code=true" in said
    assert "points 3, 4, 5, 6, 7, 8, 9, 10 and 4 more: parallelism.pp = 3: must divide the layers" in said
    hours = 2 * 4 * (60 + 100 * prediction()["step_time_s"]) / 3600
    assert f"cost: {hours:,.3g} node-hours predicted" in said
