"""A run on this machine ends well, and ends soon when a rank, rank 0 or the launcher is killed.

What an interrupt does: tests/test_local_microbench.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from piper_hpc.jobs import describe
from piper_hpc.runs import RunFolder
from tests.full import full
from tests.live import SECONDS_TO_END, SECONDS_TO_START, processes_of, rank_process, start, started, training, until

pytestmark = pytest.mark.processes


QUICK = ("train=smoke", "cluster.calibration=off")
ENDLESS = (*QUICK, "train.steps=100000")


@pytest.fixture
def launcher(tmp_path):
    with started(*ENDLESS, cwd=tmp_path) as process:
        yield process


# Of the two, the one that also writes the record; on Slurm it is the other (tests/slurm/test_runs.py).
@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=full)], ids=["rank 0", "middle rank"])
def test_a_killed_rank_ends_the_run_with_its_class_and_no_orphans(rank, launcher, tmp_path):
    run = training(launcher, tmp_path / "runs")
    rank_process(run, rank).kill()
    output, _ = launcher.communicate(timeout=SECONDS_TO_END)
    assert launcher.returncode == 1
    status = run.status()
    assert (status.state, status.failure_class) == ("failed", "killed")
    assert f"rank {rank} was killed by SIGKILL" in (status.reason or "")
    assert "killed" in output
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")


def test_a_killed_launcher_takes_its_run_along(launcher, tmp_path):
    run = training(launcher, tmp_path / "runs")
    launcher.kill()
    launcher.wait()
    until(lambda: run.status().ended, SECONDS_TO_END, "the run is recorded as ended")
    assert (run.status().state, run.status().failure_class) == ("failed", "launcher_lost")
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")


def test_a_killed_supervisor_leaves_no_rank_and_is_seen_as_a_failure(launcher, tmp_path):
    run = training(launcher, tmp_path / "runs")
    os.kill(int(run.job()["id"]), signal.SIGKILL)
    launcher.communicate(timeout=SECONDS_TO_END)
    assert launcher.returncode == 1
    assert (run.status().state, run.status().failure_class) == ("failed", "lost")
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")


def test_a_run_in_the_background_outlives_its_launcher_and_can_be_cancelled(tmp_path):
    launcher = start(*ENDLESS, "wait=false", "format=json", cwd=tmp_path)
    output, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, errors
    run = RunFolder(json.loads(output)["path"])
    try:
        until(lambda: describe(run)["last"] is not None, SECONDS_TO_START, "training starts")
        assert describe(run)["status"]["state"] == "running"
        command = [sys.executable, "-m", "piper_hpc.jobs", "cancel", run.run_id]
        cancelled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "cancelled" in cancelled.stdout
        assert run.status().state == "cancelled"
        until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")
    finally:
        for process in processes_of(run):
            process.kill()
