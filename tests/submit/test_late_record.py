"""Slurm and the record disagree for a while: a status file that comes late, no accounting, a slow cancellation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from piper_hpc.config import ConfigError
from piper_hpc.runs import Failure, RunFolder, Status
from piper_hpc.submit import outcome
from piper_hpc.submit.outcome import AWAITED, RECORD_GRACE_S, cancel, observe
from piper_hpc.submit.scheduler import GONE, JobState, duration_s, job_states, kill_wait_s, unix_time

END_S = 1_700_000_000.0
UNKNOWN = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
DISABLED = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


class Clock:
    """Time that only `sleep` moves; `then` is called after every move."""

    def __init__(self) -> None:
        self.now_s, self.then, self.slept = END_S + 1, lambda: None, []

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.slept.append(seconds)
        self.then()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    module = SimpleNamespace(time=lambda: made.now_s, monotonic=lambda: made.now_s, sleep=made.sleep)
    monkeypatch.setattr(outcome, "time", module)
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "runs", "a-run")
    made.write_status(Status("running", step=3))
    made.write_job({"scheduler": "slurm", "id": "42", "environment": {}})
    return made


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Stand-ins for Slurm's commands, each a shell script; one that is not given fails."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(**scripts: str) -> None:
        missing = dict.fromkeys(("squeue", "sacct", "scontrol", "scancel"), "exit 1")
        for name, text in (missing | scripts).items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)

    return write


def queued(word: str, end_s: float | None = END_S, reason: str = "None") -> str:
    end = "N/A" if end_s is None else datetime.fromtimestamp(end_s).isoformat()
    return f"echo '42|{word}|N/A|{end}|NOT_SET|{reason}'"


def accounted(word: str, end_s: float = END_S) -> str:
    return f"echo '42|{word}|Unknown|{datetime.fromtimestamp(end_s).isoformat()}'"


def on_disk(run: RunFolder) -> str:
    return str(json.loads((run.path / "status.json").read_text())["state"])


@pytest.mark.parametrize("command", ["squeue", "sacct"])
def test_a_completed_job_awaits_a_record_that_comes_a_minute_late(run, slurm, clock, command):
    slurm(**({"squeue": queued("COMPLETED")} if command == "squeue" else {"sacct": accounted("COMPLETED")}))
    for _ in range(6):
        seen = observe(run)
        assert (seen.state, seen.reason, seen.step, seen.ended) == ("running", AWAITED, 3, False)
        assert on_disk(run) == "running"
        clock.now_s += 10
    run.write_status(Status("completed", step=9))
    assert observe(run).state == "completed"


def test_a_completed_job_whose_record_never_comes_is_lost_in_the_end(run, slurm, clock):
    slurm(squeue=queued("COMPLETED"))
    clock.now_s = END_S + RECORD_GRACE_S + 1
    assert (observe(run).failure_class, on_disk(run)) == ("lost", "failed")


def test_without_an_end_time_the_wait_is_from_the_last_sign_of_life(run, slurm, clock):
    slurm(squeue=queued("COMPLETED", end_s=None))
    clock.now_s = run.last_written_s() + RECORD_GRACE_S - 1
    assert observe(run).reason == AWAITED
    clock.now_s += 2
    assert observe(run).failure_class == "lost"


def test_a_late_completed_wins_over_what_was_seen_from_outside(run, slurm, clock):
    """Also where the observer's file replaced it, which two nodes with caches cannot see."""
    slurm(squeue=queued("COMPLETED"))
    run.write_status(Status("completed", step=9))
    run.write_observed(Status("failed", 0, "lost", "seen too early"))
    assert (run.status().state, run.status().step, observe(run).state) == ("completed", 9, "completed")


def test_a_run_that_completes_after_it_was_given_up_has_no_failure_left(run):
    run.write_observed(Status("failed", 0, "lost", "seen too early", 3))
    run.write_status(replace(run.status(), state="completed"))  # as rank 0 ends it
    assert (run.status().state, run.status().failure_class, run.status().reason) == ("completed", None, None)


def test_a_new_attempt_makes_the_earlier_end_old(run):
    run.write_status(Status("failed", 0, "oom", "why"))
    run.write_status(Status("running", attempt=1))
    assert run.status().state == "running"
    run.write_observed(Status("failed", 1, "timeout", "why"))
    assert run.status().failure_class == "timeout"


def test_a_completed_job_with_a_word_of_failure_failed_at_once(run, slurm, clock):
    run.write_failure(Failure(2, "oom", "no memory", "", 1.0), attempt=0)
    slurm(squeue=queued("COMPLETED"))
    assert observe(run).failure_class == "oom"


def test_a_failed_job_says_so_at_once_and_who_failed_first_as_ranks_are_heard(run, slurm, clock):
    slurm(squeue=queued("FAILED"))
    assert (observe(run).failure_class, on_disk(run)) == ("lost", "failed")
    run.write_failure(Failure(0, "comm", "peer lost", "", 9.0), attempt=0)
    assert (observe(run).failure_class, run.status().failure_class) == ("killed", "killed")
    run.write_failure(Failure(3, "oom", "no memory", "", 5.0), attempt=0)
    assert (observe(run).failure_class, run.status().failure_class) == ("oom", "oom")


def test_what_a_run_said_of_its_own_end_stands(run, slurm, clock):
    run.write_status(Status("failed", 0, "lost", "as its supervisor saw it"))
    run.write_failure(Failure(3, "oom", "no memory", "", 5.0), attempt=0)
    assert observe(run).failure_class == "lost"


def test_a_job_that_the_controller_forgot_has_ended_also_without_accounting(run, slurm, clock):
    slurm(squeue=UNKNOWN, sacct=DISABLED, scontrol=UNKNOWN)
    assert job_states(["42"], {}) == {"42": JobState(GONE)}
    clock.now_s = run.last_written_s() + 1
    assert observe(run).reason == AWAITED
    clock.now_s += RECORD_GRACE_S
    assert observe(run).failure_class == "lost"


def test_a_controller_that_cannot_be_reached_ends_nothing(run, slurm, clock):
    lost = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    slurm(squeue=lost, sacct=DISABLED, scontrol=lost)
    clock.now_s += 1e6
    assert (observe(run).state, on_disk(run)) == ("running", "running")


def test_a_record_that_cannot_be_written_does_not_hide_how_the_job_ended(run, slurm, clock, monkeypatch):
    def refuse(self: RunFolder, status: Status) -> None:
        raise PermissionError

    monkeypatch.setattr(RunFolder, "write_observed", refuse)
    slurm(squeue=queued("TIMEOUT"))
    assert observe(run).failure_class == "timeout"


def test_accounting_is_asked_once_for_all_jobs_that_were_forgotten(tmp_path, slurm):
    asked = tmp_path / "asked"
    slurm(squeue="echo '7|RUNNING||||None'", sacct=f"echo x >> {asked}; echo '8|COMPLETED||'; echo '9|TIMEOUT||'")
    found = job_states(["7", "8", "9"], {})
    assert {job_id: state.word for job_id, state in found.items()} == {"7": "RUNNING", "8": "COMPLETED", "9": "TIMEOUT"}
    assert asked.read_text() == "x\n"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("2:05:03", 7503), ("1-00:00:10", 86410), ("45", 45), ("UNLIMITED", None), ("NOT_SET", None)],
)
def test_time_left_as_slurm_prints_it(text, seconds):
    assert duration_s(text) == seconds


def test_times_as_slurm_prints_them():
    assert unix_time(datetime.fromtimestamp(END_S).isoformat()) == END_S
    assert [unix_time(text) for text in ("N/A", "Unknown", "", "Tomorr 10:00")] == [None] * 4


# Cancelling --------------------------------------------------------------------------------------------------------


def slow_to_die(slurm: Callable[..., None], clock: Clock, folder: Path, seconds: float) -> None:
    """A Slurm whose job leaves its nodes `seconds` after scancel, by the clock of the test."""
    state, asked = folder / "state", folder / "cancelled"
    state.write_text("RUNNING")
    slurm(
        squeue=f'echo "42|$(cat {state})|N/A|N/A|10:00|None"',
        scancel=f"touch {asked}",
        scontrol="echo 'KillOnBadExit           = 0'; echo 'KillWait                = 30 sec'",
    )
    began: list[float] = []

    def move() -> None:
        if asked.exists():
            began.append(clock.now_s)
            state.write_text("CANCELLED" if clock.now_s - began[0] >= seconds else "COMPLETING")

    clock.then = move


def test_a_cancel_waits_out_what_slurm_gives_the_job(run, slurm, clock, tmp_path):
    slow_to_die(slurm, clock, tmp_path, 30)
    told: list[float] = []
    assert cancel(run, told.append).state == "cancelled"
    assert told == [60.0], "KillWait and a margin"
    assert len(clock.slept) < 60, "the controller is asked every two seconds at most"
    assert on_disk(run) == "cancelled"


def test_a_cancel_that_takes_longer_says_that_the_run_goes_on(run, slurm, clock, tmp_path):
    slow_to_die(slurm, clock, tmp_path, 1e4)
    assert cancel(run).state == "running"
    assert 60 <= clock.now_s - END_S < 65


def test_a_job_that_ended_before_scancel_came_is_no_error(run, slurm, clock, tmp_path):
    state = tmp_path / "state"
    state.write_text("RUNNING")
    slurm(
        squeue=f'echo "42|$(cat {state})|N/A|N/A|10:00|None"',
        scancel=f"echo COMPLETED > {state}; echo 'Job/step already completing or completed' >&2; exit 1",
    )
    clock.now_s = run.last_written_s()
    assert cancel(run).reason == AWAITED


def test_a_scancel_that_fails_is_an_error(run, slurm, clock):
    slurm(squeue=queued("RUNNING", None), scancel="echo 'Access/permission denied' >&2; exit 1")
    with pytest.raises(ConfigError, match="permission denied"):
        cancel(run)


def test_where_slurm_does_not_say_its_default_stands(slurm):
    slurm()
    assert kill_wait_s({}) == 30
