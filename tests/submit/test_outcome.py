"""How a run that ended without a status of its own is classified."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cli import follow
from piper_hpc.config import ConfigError
from piper_hpc.runs import Failure, RunFolder, Status
from piper_hpc.runtime import slurm
from piper_hpc.submit.outcome import cancel, failure_status, observe, observe_all
from piper_hpc.submit.process import alive
from piper_hpc.submit.scheduler import JobState, job_states


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
        ("REQUEUE_HOLD", "", "REQUEUE_HOLD", "pending", None),
        ("SIGNALING", "", "SIGNALING", "running", None),
        ("STAGE_OUT", "", "STAGE_OUT", "running", None),
        ("A_WORD_OF_TOMORROW", "", "A_WORD_OF_TOMORROW", "running", None),
    ],
)
def test_slurms_word_becomes_a_state_and_a_class(run, tmp_path, queue, accounting, word, state, failure_class):
    """Stand-ins for squeue and sacct say the word; the real ones speak in tests/slurm."""
    commands = tmp_path / "bin"
    commands.mkdir()
    queued = f"42|{queue}|N/A|N/A|NOT_SET|None" if queue else ""
    for name, answer in (("squeue", queued), ("sacct", f"42|{accounting}||"), ("scontrol", "")):
        (commands / name).write_text(f"#!/bin/sh\necho '{answer}'\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}"}
    run.write_status(Status("running"))
    run.write_job({"scheduler": "slurm", "id": "42", "environment": environment})
    original = os.environ["PATH"]
    os.environ["PATH"] = environment["PATH"]  # how subprocess finds the command
    try:
        assert job_states(["42"], environment) == {"42": JobState(word)}
        seen = observe(run)
    finally:
        os.environ["PATH"] = original
    assert (seen.state, seen.failure_class) == (state, failure_class)


def with_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """These commands before the system's, each a shell script."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def slurm_runs(folder: Path, *ids: str) -> list[RunFolder]:
    runs = []
    for job_id in ids:
        made = RunFolder.create(folder, f"run-{job_id}")
        made.write_status(Status("pending"))
        made.write_job({"scheduler": "slurm", "id": job_id, "environment": {}})
        runs.append(made)
    return runs


def test_all_runs_are_asked_for_at_once_and_a_job_that_waits_says_why(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    runs = slurm_runs(tmp_path, "7", "8")
    with_commands(
        tmp_path, monkeypatch, squeue=f"echo $* >> {asked}; echo '7|PENDING||||Priority'; echo '8|RUNNING||||None'"
    )
    known = observe_all(runs)
    assert [observe(run, known).state for run in runs] == ["pending", "running"]
    assert observe(runs[0], known).reason == "Priority"
    assert len(asked.read_text().splitlines()) == 1 and "7,8" in asked.read_text()


def test_a_slurm_that_does_not_answer_in_time_ends_nothing(tmp_path, monkeypatch):
    (run,) = slurm_runs(tmp_path, "7")
    monkeypatch.setattr(slurm, "TIMEOUT_S", 0.2)
    with_commands(tmp_path, monkeypatch, **dict.fromkeys(("squeue", "sacct", "scontrol"), "exec sleep 5"))
    assert observe(run).state == "pending"


def test_who_follows_a_job_that_waits_asks_seldom(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    (run,) = slurm_runs(tmp_path, "7")
    with_commands(tmp_path, monkeypatch, squeue=f"echo x >> {asked}; echo '7|PENDING||||Priority'")
    now = [0.0]
    monkeypatch.setattr(follow.time, "monotonic", lambda: now[0])
    watch = follow.Watch(run)
    for second in range(600):
        now[0] = float(second)
        assert watch.status().reason == "Priority"
    assert 10 < len(asked.read_text().splitlines()) < 25
    run.write_status(Status("completed"))
    assert watch.status().state == "completed", "the record is read every time"


LATE = "RuntimeError: Timed out waiting 20000ms for recv operation"
KERNEL = "1 processes were killed for lack of memory on n2 meanwhile (oom_kill in /proc/vmstat)"


def test_a_rank_that_does_not_come_is_named_with_step_and_place(run):
    for rank in range(3):
        run.log(0, rank).touch()
    where = "rank 0 was at reduction that ends the step of step 12"
    run.write_failure(Failure(0, "hang", LATE, "", 1.0, "n1", (where,), 12), 0)
    run.write_failure(Failure(2, "comm", "closed by peer", "", 2.0, "n2", (), 12), 0)
    status = failure_status(run, Status("running"))
    assert status.failure_class == "hang" and where in status.evidence
    reason = status.reason or ""
    assert reason.startswith("rank 1 did not come to the reduction that ends the step of step 12; rank 0 waited")
    # Where it spoke in the end, it is the one that was least far.
    run.write_failure(Failure(1, "comm", "closed by peer", "", 3.0, "n1", (), 11), 0)
    assert "rank 1 did not come" in (failure_status(run, Status("running")).reason or "")
    # In the same step: it entered its collective after the others had given up.
    run.write_failure(Failure(1, "comm", "closed by peer", "", 3.0, "n1", (), 12, entered_s=2.5), 0)
    assert "rank 1 did not come" in (failure_status(run, Status("running")).reason or "")

    # It was stopped inside the collective: the first that gave up names it, or the store that it serves.
    for words, late in (("rank 1 is the first that did not enter it", 1), ("does not answer: rank 0, or its node", 0)):
        run.write_failure(Failure(2, "hang", f"MissingPeerError: {words}", "", 0.5, "n2", (where,), 12), 0)
        assert (failure_status(run, Status("running")).reason or "").startswith(f"rank {late} did not come")


@pytest.mark.parametrize(("node", "failure_class"), [("n2", "oom"), ("n1", "killed")])
def test_a_rank_killed_where_the_kernel_lacked_memory_is_out_of_memory(run, node, failure_class):
    run.write_manifest({"job": {"attempt": 0, "node_of_rank": ["n1", "n2"]}})
    for rank in range(2):
        run.log(0, rank).touch()
    run.write_failure(Failure(0, "comm", "closed by peer", "", 1.0, node, (KERNEL,)), 0)
    assert failure_status(run, Status("running")).failure_class == failure_class
    assert failure_status(run, Status("running"), codes={0: 1, 1: -9}).failure_class == failure_class
    assert failure_status(run, Status("running"), {0: 1, 1: -9}, [KERNEL]).failure_class == "oom"
    assert failure_status(run, Status("running"), {0: 1, 1: -15}, [KERNEL]).failure_class == "killed"
