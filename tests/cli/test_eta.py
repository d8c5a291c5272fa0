"""When a run ends: measured, predicted, and not known."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from piper_hpc.cli import describe as described
from piper_hpc.cli import follow as followed
from piper_hpc.cli.describe import describe
from piper_hpc.cli.eta import Eta, eta, measured_step_s, span
from piper_hpc.cli.follow import follow
from piper_hpc.runs import RunFolder, Status
from piper_hpc.submit.scheduler import JobState
from tests.test_jobs import run_jobs, whole

NOW_S = 1_700_000_000.0


def row(step: int, wall_s: float, **changes: Any) -> dict[str, Any]:
    taken = {"step": step, "attempt": 0, "warmup": step < 2, "wall_s": wall_s, "step_time_s": wall_s / 2}
    return taken | {"loss": 5.25, "tokens_per_s": 1e6, "mfu": 0.25} | changes


def test_the_mean_of_the_last_steps_of_the_newest_attempt_without_warm_up():
    rows = [row(0, 90.0), row(1, 80.0), row(2, 1.0), row(3, 3.0)]
    assert measured_step_s(rows) == 2.0
    assert measured_step_s([*rows, row(2, 60.0, attempt=1, warmup=True, step_time_s=7.0)]) == 7.0
    assert measured_step_s([row(step, 100.0 if step < 50 else 1.0) for step in range(80)]) == 1.0


@pytest.mark.parametrize("bad", [None, "soon", 0, -1.0, float("nan")])
def test_rows_without_a_time_tell_none(bad):
    assert measured_step_s([row(2, 1.0) | {"wall_s": bad, "step_time_s": bad}]) is None


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_what_waits_ends_as_much_later_as_it_waits(left, step_s, wait_s):
    predicted = {"step_time_s": step_s}
    running = eta("running", left, [], predicted, JobState("RUNNING", start_s=1.0), NOW_S)
    waits = eta("pending", left, [], predicted, JobState("PENDING", start_s=NOW_S + wait_s), NOW_S)
    assert running is not None and waits is not None
    assert (running.source, running.seconds) == ("predicted", left * step_s)
    assert waits.seconds == pytest.approx(running.seconds + wait_s)


@pytest.mark.parametrize(
    ("state", "left", "prediction", "said"),
    [
        ("pending", 4, {"step_time_s": 1.0}, None),
        ("pending", 4, {"step_time_s": 1.0}, JobState("PENDING")),
        ("running", None, {"step_time_s": 1.0}, None),
        ("running", 4, {}, None),
        ("running", 4, {"step_time_s": "soon"}, None),
        ("completed", 0, {"step_time_s": 1.0}, None),
        (None, 4, {"step_time_s": 1.0}, None),
    ],
)
def test_nothing_is_said_where_nothing_is_known(state, left, prediction, said):
    assert eta(state, left, [], prediction, said, NOW_S) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")],
)
def test_how_long_in_words(seconds, words):
    assert span(seconds) == words
    assert str(Eta(seconds, "predicted")) == f"~{words}"


# The commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of job 42 in `tmp_path/runs`, of which squeue says `line`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(described, "time", SimpleNamespace(time=lambda: NOW_S))

    def make(line: str, state: str) -> RunFolder:
        waiting = "printf '7|batch\\n9|debug\\n42|batch\\n50|batch\\n'"  # by priority
        text = f"#!/bin/sh\ncase $* in *--states=PENDING*) {waiting};; *) echo '42|{line}';; esac\n"
        (folder / "squeue").write_text(text)
        (folder / "squeue").chmod(0o755)
        run = RunFolder.create(tmp_path / "runs", "20260101-120000-aabbccdd")
        config = {"train": {"steps": 100}, "task": {"name": "train"}}
        names = {"model": {"name": "deepseek_v3_671b_long"}, "cluster": {"name": "juwels_booster"}}
        run.write_config(json.dumps(config | names))
        run.write_manifest({"user": "ada"})
        run.write_prediction({"step_time_s": 3.0})
        run.write_job({"scheduler": "slurm", "id": "42", "environment": {}})
        run.write_status(Status(state))
        return run

    return make


def test_a_job_that_waits_says_why_until_when_and_its_predicted_end(in_slurm, tmp_path, monkeypatch, capsys):
    starts = datetime.fromtimestamp(NOW_S + 7200).isoformat()
    run = in_slurm(f"PENDING|{starts}|N/A|1:00:00|Priority", "pending")
    document = describe(run)
    waits = {"state": "PENDING", "reason": "Priority", "expected_start": "2023-11-15T00:13:20Z"}
    assert document["queue"] == waits | {"place": 2, "of": 3}
    assert (document["eta_s"], document["eta_from"]) == (7500.0, "predicted")
    assert document["time_left_s"] == 3600.0
    assert run_jobs(monkeypatch, "status", "latest", "--runs", str(tmp_path / "runs")) == 0
    text = capsys.readouterr().out
    assert "Priority, 2 of 3 that wait for its partition, expected to start at" in text and "in 2 h 00 min" in text
    assert "~2 h 05 min, by the step time as predicted" in text


def test_a_running_job_says_its_measured_end_and_that_the_limit_comes_first(in_slurm, tmp_path, monkeypatch, capsys):
    run = in_slurm("RUNNING|N/A|N/A|5:00|None", "running")
    for step in range(10):
        run.append_metrics(row(step, 20.0 if step < 2 else 10.0))
    document = describe(run)
    assert (document["eta_s"], document["eta_from"], document["time_left_s"]) == (900.0, "measured", 300.0)
    nothing = dict.fromkeys(("reason", "expected_start", "place", "of"))
    assert document["queue"] == {"state": "RUNNING", **nothing}
    assert run_jobs(monkeypatch, "status", "latest", "--runs", str(tmp_path / "runs")) == 0
    text = capsys.readouterr().out
    assert "ends in  15 min, by the step time as measured" in text
    assert "5 min left, which is not enough" in text


def test_the_list_fits_120_columns_and_cuts_no_id(in_slurm, tmp_path, monkeypatch, capsys):
    starts = datetime.fromtimestamp(NOW_S + 7200).isoformat()
    run = in_slurm(f"PENDING|{starts}|N/A|1:00:00|QOSMaxJobsPerUserLimit", "pending")
    for step in range(10):
        run.append_metrics(row(step, 10.0, tokens_per_s=12_345_678.0))
    failed = whole(tmp_path / "runs", "20260101-120001-eeff0011")
    failed.write_status(Status("failed", 0, "launcher_lost", "why"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("sys.argv", ["jobs", "list", "--runs", str(tmp_path / "runs")])
    from piper_hpc.jobs import main

    assert main() == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert all(word in text for word in (run.run_id, failed.run_id, "12,345,678", "2 h 15 min", "tokens/s", "10/100"))
    assert "…" not in text and "launcher_lost" in "".join(text.split())


def test_waiting_prints_the_reason_once_and_the_end_with_the_steps(in_slurm, tmp_path, monkeypatch):
    run = in_slurm("PENDING|N/A|N/A|1:00:00|Resources", "pending")
    looks = 0

    def pause(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            run.write_status(Status("running"))
            run.append_metrics(row(0, 8.0, step_time_s=2.0))
        if looks == 6:
            run.write_status(Status("completed"))

    # A clock of its own: subprocess, which asks squeue, sleeps by the real one while it waits.
    monkeypatch.setattr(followed, "time", SimpleNamespace(sleep=pause, time=time.time, monotonic=time.monotonic))
    console = Console(file=(tmp_path / "out").open("w"), width=120)
    assert follow(run, 100, console).state == "completed"
    console.file.close()
    text = (tmp_path / "out").read_text()
    assert text.count("pending Resources") == 1
    assert "MFU 25.0 %" in text and "step 1/100" in text
