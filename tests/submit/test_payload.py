"""What a rank does around its task: asked to end, it has a moment to leave word."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from piper_hpc.runs import RunFolder
from piper_hpc.runtime import memory_kills
from piper_hpc.runtime.rank import local_variables
from piper_hpc.submit.payload import LEAVE_S

pytestmark = pytest.mark.slow

RANK = """
import itertools, sys, time
import piper_hpc.runtime.failures  # with torch, as a rank at work has it
from piper_hpc.runs import RunFolder
from piper_hpc.runtime import memory_kills
from piper_hpc.submit.payload import run_as_rank

if sys.argv[2] == "lacks memory":
    numbers = itertools.count()
    memory_kills.counted = lambda: {"/proc/vmstat": next(numbers)}

def task(run, rank_env):
    (run.path / "began").touch()
    time.sleep(0.5)
    if sys.argv[2] == "speaks":
        raise RuntimeError("lost a peer")
    time.sleep(60)

run_as_rank(RunFolder(sys.argv[1]), task)
"""


def ended(tmp_path: Path, what: str) -> tuple[RunFolder, int, float]:
    """A rank that is asked to end once it is at work: its run, its exit code, and for how long it went on, in s."""
    run = RunFolder.create(tmp_path)
    command = [sys.executable, "-c", RANK, str(run.path), what]
    with subprocess.Popen(command, env=local_variables(0, 1, "7")) as rank:
        while not (run.path / "began").exists():
            time.sleep(0.01)
        rank.send_signal(signal.SIGTERM)
        began = time.monotonic()
        return run, rank.wait(timeout=30), time.monotonic() - began


def test_one_that_finds_out_what_happened_says_so(tmp_path: Path) -> None:
    run, code, _ = ended(tmp_path, "speaks")
    assert code == 1
    assert [failure.reason for failure in run.failures(0)] == ["RuntimeError: lost a peer"]


def test_one_that_is_ended_before_it_missed_anybody_tells_that_its_node_lacked_memory(tmp_path: Path) -> None:
    run, code, _ = ended(tmp_path, "lacks memory")
    (failure,) = run.failures(0)
    assert code == -signal.SIGTERM and failure.failure_class == "comm"
    assert memory_kills.WORDS in failure.evidence[0]


def test_one_that_goes_on_is_ended_by_the_signal(tmp_path: Path) -> None:
    run, code, went_on_s = ended(tmp_path, "goes on")
    assert code == -signal.SIGTERM and not run.failures(0)
    assert went_on_s > LEAVE_S - 0.5
