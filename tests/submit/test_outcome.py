"""How a run that ended without a status of its own is classified."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from piper_hpc.config import ConfigError
from piper_hpc.runs import Failure, RunFolder, Status
from piper_hpc.submit.outcome import cancel, failure_status, observe, slurm_state
from piper_hpc.submit.process import alive


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path)


def fail(run: RunFolder, rank: int, failure_class: str, at: float) -> None:
    run.write_failure(Failure(rank, failure_class, "why", "", at), attempt=0)


def test_the_first_failure_that_is_no_echo_is_the_cause(run):
    fail(run, 0, "comm", at=1.0)
    fail(run, 2, "oom", at=2.0)
    fail(run, 1, "error", at=3.0)
    status = failure_status(run, Status("running", step=7))
    assert (status.state, status.failure_class, status.step) == ("failed", "oom", 7)
    assert "rank 2" in (status.reason or "")


def test_a_killed_rank_is_the_cause_whatever_its_peers_say(run):
    fail(run, 0, "comm", at=1.0)
    status = failure_status(run, Status("running"), codes={0: 1, 1: -9, 2: 1})
    assert (status.failure_class, status.reason) == ("killed", "rank 1 was killed by SIGKILL")


def test_only_echoes_mean_that_somebody_was_killed(run):
    for rank in range(4):
        run.log(0, rank).touch()
    for rank in (3, 0, 1):
        fail(run, rank, "comm", at=float(4 - rank))
    status = failure_status(run, Status("running"))
    assert status.failure_class == "killed"
    assert "without a word: rank 2;" in (status.reason or "") and "rank 3: why" in (status.reason or "")


def test_a_requeued_attempt_that_never_ran_is_told_by_its_own_failures(run):
    fail(run, 0, "oom", at=1.0)
    run.write_failure(Failure(2, "rendezvous", "nobody came", "", 9.0), attempt=1)
    status = failure_status(run, Status("pending"))
    assert (status.failure_class, status.attempt) == ("rendezvous", 1)


def test_a_local_run_of_another_host_is_left_alone(run):
    run.write_job({"scheduler": "local", "id": "1", "host": "elsewhere", "environment": {}})
    run.write_status(Status("running"))
    assert observe(run).state == "running"
    with pytest.raises(ConfigError, match="elsewhere"):
        cancel(run)


def test_without_slurms_commands_the_record_stands(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run.write_job({"scheduler": "slurm", "id": "42", "environment": {}})
    run.write_status(Status("running"))
    assert observe(run).state == "running"


def test_silence_is_lost_and_says_where_to_look(run):
    status = failure_status(run, Status("running"))
    assert status.failure_class == "lost"
    assert str(run.logs) in (status.reason or "")


def test_a_run_whose_supervisor_is_gone_is_seen_as_ended_and_recorded(run):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run.write_status(Status("running"))
    run.write_job({"scheduler": "local", "id": str(gone.pid), "environment": {}})
    assert not alive(gone.pid)
    assert observe(run).failure_class == "lost"
    assert run.status().state == "failed"


def test_a_process_whose_program_is_still_being_loaded_is_alive(run):
    """The kernel shows no command line of it yet."""
    for _ in range(30):
        started = subprocess.Popen([sys.executable, "-S", "-c", "open(0).read()", run.run_id], stdin=subprocess.PIPE)
        try:
            assert alive(started.pid, run.run_id)
        finally:
            started.communicate()
        assert not alive(started.pid, run.run_id)


def test_a_running_supervisor_keeps_the_state_and_a_finished_record_is_final(run):
    supervisor = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()", run.run_id], stdin=subprocess.PIPE
    )
    try:
        run.write_job({"scheduler": "local", "id": str(supervisor.pid), "environment": {}})
        run.write_status(Status("running"))
        assert observe(run).state == "running"
        run.write_status(Status("completed"))
        assert observe(run).state == "completed"
    finally:
        supervisor.communicate()


def test_another_process_of_the_same_id_is_not_the_supervisor(run):
    run.write_job({"scheduler": "local", "id": str(os.getpid()), "environment": {}})
    run.write_status(Status("running"))
    assert observe(run).failure_class == "lost"


@pytest.mark.parametrize(
    ("queue", "accounting", "word", "state", "failure_class"),
    [
        ("PENDING", "", "PENDING", "pending", None),
        ("RUNNING", "", "RUNNING", "running", None),
        ("", "CANCELLED by 0", "CANCELLED", "cancelled", None),
        ("", "TIMEOUT", "TIMEOUT", "failed", "timeout"),
        ("", "OUT_OF_MEMORY", "OUT_OF_MEMORY", "failed", "oom"),
        ("", "NODE_FAIL", "NODE_FAIL", "failed", "node_fail"),
        ("", "PREEMPTED", "PREEMPTED", "failed", "preempted"),
        ("", "FAILED", "FAILED", "failed", "lost"),
    ],
)
def test_slurms_word_becomes_a_state_and_a_class(run, tmp_path, queue, accounting, word, state, failure_class):
    """Stand-ins for squeue and sacct say the word; the real ones speak in tests/slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, answer in (("squeue", queue), ("sacct", accounting), ("scontrol", "")):
        (commands / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    run.write_status(Status("pending"))
    run.write_job({"scheduler": "slurm", "id": "42", "environment": environment})
    original = os.environ["PATH"]
    os.environ["PATH"] = environment["PATH"]  # how subprocess finds the command
    try:
        assert slurm_state("42", environment) == word
        seen = observe(run)
    finally:
        os.environ["PATH"] = original
    assert (seen.state, seen.failure_class) == (state, failure_class)
