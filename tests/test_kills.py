"""A run on this machine ends well, and ends soon when a rank, rank 0 or the launcher is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from piper_hpc.jobs import describe
from piper_hpc.runs import RunFolder, find

pytestmark = pytest.mark.processes


QUICK = ("train=smoke", "cluster.calibration=off")
ENDLESS = (*QUICK, "train.steps=100000")
SECONDS_TO_END = 15


def start(*overrides: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.05)


def processes_of(run: RunFolder) -> list[psutil.Process]:
    """Every process that works for a run, told by its command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if run.run_id in " ".join(process.info["cmdline"] or ()) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def rank_process(run: RunFolder, rank: int) -> psutil.Process:
    for process in processes_of(run):
        if process.environ().get("SUBMITIT_LOCAL_GLOBALID") == str(rank):
            return process
    raise AssertionError(f"rank {rank} is not running")


def training(launcher: subprocess.Popen[str], runs: Path) -> RunFolder:
    """Wait until the run takes steps."""

    def steps_taken() -> bool:
        if launcher.poll() is not None:
            raise AssertionError(f"the launcher ended early: {launcher.communicate()}")
        known = find(runs)
        return bool(known) and len(known[-1].metrics()) >= 2

    until(steps_taken, 90, "training starts")
    return find(runs)[-1]


@pytest.fixture
def launcher(tmp_path):
    process = start(*ENDLESS, cwd=tmp_path)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


@pytest.mark.parametrize("rank", [2, 0], ids=["middle rank", "rank 0"])
def test_a_killed_rank_ends_the_run_with_its_class_and_no_orphans(rank, launcher, tmp_path):
    run = training(launcher, tmp_path / "runs")
    rank_process(run, rank).kill()
    output, _ = launcher.communicate(timeout=SECONDS_TO_END)
    assert launcher.returncode == 1
    status = run.status()
    assert (status.state, status.failure_class) == ("failed", "killed")
    assert f"rank {rank} was killed by SIGKILL" in (status.reason or "")
    assert "killed" in output
    assert processes_of(run) == []


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


def test_an_interrupt_cancels(launcher, tmp_path):
    run = training(launcher, tmp_path / "runs")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=SECONDS_TO_END)
    assert launcher.returncode == 130
    assert run.status().state == "cancelled"
    assert processes_of(run) == []


def test_a_run_in_the_background_outlives_its_launcher_and_can_be_cancelled(tmp_path):
    launcher = start(*ENDLESS, "wait=false", "format=json", cwd=tmp_path)
    output, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 0, errors
    run = RunFolder(json.loads(output)["path"])
    try:
        until(lambda: describe(run)["last"] is not None, 90, "training starts")
        assert describe(run)["status"]["state"] == "running"
        command = [sys.executable, "-m", "piper_hpc.jobs", "cancel", run.run_id]
        cancelled = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "cancelled" in cancelled.stdout
        assert run.status().state == "cancelled"
        until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")
    finally:
        for process in processes_of(run):
            process.kill()
