"""Handle a live run from a test: start a launcher, wait for steps, find the processes that work for a run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from piper_hpc.runs import RunFolder, find

SECONDS_TO_START = 150
SECONDS_TO_END = 40


def start(*overrides: str, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def started(*overrides: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """A launcher that is interrupted at the end, should it still run."""
    process = start(*overrides, cwd=cwd)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)


def launch(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


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
        if process.name() == f"piper rank {rank}":  # of this machine
            return process
        # On Slurm; srun carries the environment of rank 0 too.
        if "python" in process.name() and process.environ().get("SLURM_PROCID") == str(rank):
            return process
    raise AssertionError(f"rank {rank} is not running")


def training(launcher: subprocess.Popen[str], runs: Path) -> RunFolder:
    """Wait until the run takes steps."""

    def steps_taken() -> bool:
        if launcher.poll() is not None:
            raise AssertionError(f"the launcher ended early: {launcher.communicate()}")
        known = find(runs)
        return bool(known) and len(known[-1].metrics()) >= 2

    until(steps_taken, SECONDS_TO_START, "training starts")
    return find(runs)[-1]
