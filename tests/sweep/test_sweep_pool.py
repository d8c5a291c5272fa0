"""Pools: who gets a point, when one is taken and when it fits, what a hang and a lost job leave."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder, Status
from piper_hpc.runs.sweeps import Claim, SweepFolder, SweepPoint
from piper_hpc.submit.scheduler import JobState
from piper_hpc.sweep import owner, pool
from piper_hpc.sweep.owner import gone, this_process
from piper_hpc.sweep.pool import Left, Pool, Rules
from piper_hpc.sweep.submit import Queue, tasks_of
from tests.finished_run import metrics_row, prediction


def make_sweep(root: Path, points: int, total_s: float = 10.0) -> SweepFolder:
    sweep, made = SweepFolder.create(root / "runs", "one"), []
    for index in range(points):
        run = RunFolder.create(root / "runs", f"run-{index}")
        run.write_prediction(prediction())
        run.write_status(Status("pending"))
        made.append(
            SweepPoint(
                index, {}, "new", run_id=run.run_id, group=0, nodes=1, steps=4, step_time_s=0.01, total_s=total_s
            )
        )
    sweep.write_points(made)
    sweep.write_document({"groups": [{}], "kind": "grid"})
    return sweep


Work = Callable[[RunFolder, threading.Event], None]


class Started:
    """A point as a thread. work: what it does, told of its end."""

    def __init__(self, run: RunFolder, work: Work) -> None:
        self.killed = threading.Event()
        self._thread = threading.Thread(target=work, args=(run, self.killed))
        self._thread.start()

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def kill(self) -> None:
        self.killed.set()
        self._thread.join()


class Starter:
    def __init__(self, work: dict[str, Work], left_s: float | None = None) -> None:
        self.work, self.left, self.started, self.ending = work, left_s, list[str](), False

    def start(self, run: RunFolder) -> Started:
        self.started.append(run.run_id)
        return Started(run, self.work.get(run.run_id, completes))

    def left_s(self) -> float | None:
        return self.left

    def is_ending(self) -> bool:
        return self.ending


def completes(run: RunFolder, killed: threading.Event) -> None:
    for step in range(4):
        run.append_metrics(metrics_row(step))
    run.write_status(Status("completed"))


def hangs(run: RunFolder, killed: threading.Event) -> None:
    run.append_metrics(metrics_row(0))
    killed.wait()


def dies(run: RunFolder, killed: threading.Event) -> None:
    run.append_metrics(metrics_row(0))


def runs_out_of_time(run: RunFolder, killed: threading.Event) -> None:
    run.write_status(Status("failed", 0, "timeout", "left before the limit"))


def leaves_in_time(run: RunFolder, killed: threading.Event) -> None:
    run.write_status(Status("pending", 0, None, "left before the limit, to go on in another job"))


def drain(sweep: SweepFolder, starter: Starter) -> bool:
    return Pool(sweep, 0, starter, Rules(start_s=5, stall_s=0.3), log=lambda text: None).drain()


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(pool, "POLL_S", 0.02)


def test_a_hang_and_a_failure_end_their_points_and_the_pool_goes_on(tmp_path):
    sweep = make_sweep(tmp_path, 4)
    starter = Starter({"run-1": hangs, "run-2": dies})
    assert drain(sweep, starter)
    ends = {index: claims[-1].end for index, claims in sweep.claims().items()}
    assert [(ends[i]["state"], ends[i]["failure_class"]) for i in range(4)] == [
        ("completed", None),
        ("failed", "hang"),
        ("failed", "lost"),
        ("completed", None),
    ]
    status = RunFolder(tmp_path / "runs" / "run-1").status()
    assert "after step 0" in (status.reason or "")
    # What failed has failed: only another sweep takes it up again.
    assert Left(sweep, 0).look() == ([], [])


def test_a_point_that_is_taken_up_again_may_take_its_time_to_start(tmp_path):
    sweep = make_sweep(tmp_path, 1)
    RunFolder(tmp_path / "runs" / "run-0").append_metrics(metrics_row(0))

    def starts_slowly(run: RunFolder, killed: threading.Event) -> None:
        killed.wait(1.0)  # more than stall_s
        if not killed.is_set():
            completes(run, killed)

    assert drain(sweep, Starter({"run-0": starts_slowly}))
    assert sweep.claims()[0][0].end["state"] == "completed"


def test_a_point_is_taken_while_its_time_fits_and_a_shorter_one_after_it(tmp_path):
    sweep = make_sweep(tmp_path, 3)
    long, *others = sweep.points()
    sweep.write_points([type(long)(**vars(long) | {"total_s": 900.0, "steps": 90_000}), *others])
    starter = Starter({}, left_s=60.0)
    assert not drain(sweep, starter)
    assert starter.started == ["run-1", "run-2"]
    assert [point.index for point, _ in Left(sweep, 0).look()[0]] == [0]
    starter.left = None  # where nobody says when the job ends
    assert drain(sweep, starter)


def test_what_a_lost_job_held_is_free_again_and_what_ended_is_not(tmp_path):
    sweep = make_sweep(tmp_path, 2)
    for leaves in (runs_out_of_time, leaves_in_time):
        starter = Starter({"run-0": leaves})
        assert not drain(sweep, starter)
        assert starter.started == ["run-0"] and not sweep.claims()[0][0].end
        for file in (sweep.path / "claims").iterdir():
            file.unlink()
    starter = Starter({"run-0": dies})
    starter.ending = True
    assert not drain(sweep, starter)
    (claim,) = sweep.claims()[0]
    assert not claim.end and starter.started == ["run-0"]
    # This process lives, and so its claim does.
    assert [point.index for point in Left(sweep, 0).look()[1]] == [0]
    dead = subprocess.Popen([sys.executable, "-c", ""])
    started_s = psutil.Process(dead.pid).create_time()
    dead.wait()
    of_dead = this_process() | {"id": str(dead.pid), "started_s": started_s}
    for file in (sweep.path / "claims").iterdir():
        file.unlink()
    assert sweep.claim(0, 0, of_dead) and not sweep.claim(0, 0, this_process())
    free, busy = Left(sweep, 0).look()
    assert [(point.index, attempt) for point, attempt in free] == [(0, 1), (1, 0)] and busy == []
    RunFolder(tmp_path / "runs" / "run-0").write_status(Status("failed", 0, "launcher_lost", "gone"))
    starter.ending, starter.work = False, {}
    assert drain(sweep, starter)
    assert [claim.attempt for claim in sweep.claims()[0]] == [0, 1]
    assert RunFolder(tmp_path / "runs" / "run-0").status().state == "completed"


def test_one_of_many_gets_a_point(tmp_path):
    sweep = make_sweep(tmp_path, 1)
    got: list[int] = []

    def take(number: int) -> None:
        if sweep.claim(0, 0, this_process() | {"number": number}):
            got.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and sweep.claims()[0][0].owner["number"] == got[0]
    assert [path.name for path in (sweep.path / "claims").iterdir()] == ["0.0.json"]
    sweep.end_claim(Claim(0, 0, {}, {}), {"time_s": time.time()})
    assert sweep.claims()[0][0].end and json.loads((sweep.path / "claims" / "0.0.end.json").read_text())


def test_several_pools_share_a_list(tmp_path):
    sweep = make_sweep(tmp_path, 12)
    starters = [Starter({}) for _ in range(3)]
    threads = [threading.Thread(target=drain, args=(sweep, starter)) for starter in starters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = [run_id for starter in starters for run_id in starter.started]
    assert sorted(started) == sorted(f"run-{index}" for index in range(12))


@pytest.mark.parametrize(
    ("word", "restart", "is_gone"),
    [("RUNNING", 0, False), ("PENDING", 0, True), ("TIMEOUT", 0, True), ("GONE", 0, True), (None, 0, False)],
)
def test_a_task_of_slurms_holds_its_points_while_it_runs(monkeypatch, word, restart, is_gone):
    def states(ids, environment):
        assert ids == ["7_1"] and environment == {"SLURM_CONF": "x"}
        return {} if word is None else {"7_1": JobState(word)}

    monkeypatch.setattr(owner, "job_states", states)
    held = {"scheduler": "slurm", "id": "7_1", "restart": restart, "environment": {"SLURM_CONF": "x"}, "host": "n1"}
    assert gone([held], None) == [is_gone]


def test_a_requeued_task_knows_its_own_earlier_life():
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "9", "SLURM_RESTART_COUNT": "1"}
    me = this_process(environ)
    assert (me["scheduler"], me["id"], me["restart"]) == ("slurm", "7_1", 1)
    assert gone([me | {"restart": 0}, me], me) == [True, False]
    elsewhere = {"scheduler": "local", "id": "1", "started_s": 0.0, "host": "another", "environment": {}}
    assert gone([elsewhere, elsewhere | {"host": platform.node(), "id": str(os.getpid())}], me) == [False, True]


@pytest.mark.parametrize(
    ("points", "limits", "queued", "most", "tasks"),
    [
        (3, {}, 0, None, 3),
        (5000, {}, 0, None, 1000),
        (30, {"jobs_running": 4, "jobs_queued": 100}, 0, None, 4),
        (500, {"jobs_running": 4, "jobs_queued": 100}, 0, None, 53),  # four jobs' time is not enough
        (500, {"jobs_running": 4, "jobs_queued": 100}, 90, None, 10),
        (500, {"jobs_running": 4, "jobs_queued": 100}, 100, None, 0),
        (30, {"jobs_running": 4}, 0, 2, 2),
    ],
)
def test_an_array_has_as_many_tasks_as_a_site_lets_run_and_points_need(points, limits, queued, most, tasks):
    cluster = ClusterConfig(name="site", time_min=120, **limits)
    some = [SweepPoint(index, {}, "new", nodes=8, total_s=600.0) for index in range(points)]
    assert tasks_of(some, cluster, Queue(queued), most) == tasks
