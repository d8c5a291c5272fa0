"""`python -m piper_hpc.jobs`: no folder under runs/, whatever it holds, ends a listing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from piper_hpc import jobs
from piper_hpc.runs import Failure, RunFolder, Status, attempts

CONFIG: dict[str, Any] = {
    "task": {"name": "train"},
    "model": {"name": "tiny"},
    "cluster": {"name": "local"},
    "train": {"steps": 4},
}
STEP = {"step": 1, "loss": 5.25, "tokens_per_s": 10.0, "mfu": 0.25, "step_time_s": 1.0}


def whole(root: Path, name: str) -> RunFolder:
    """A completed run with one step."""
    run = RunFolder.create(root, name)
    run.write_config(yaml.safe_dump(CONFIG))
    run.write_manifest({"user": "ada"})
    run.append_metrics(STEP)
    run.write_status(Status("completed"))
    run.write_report("report.md", "")
    return run


def without_configuration(run: RunFolder) -> None:
    (run.path / "config.yaml").unlink()
    run.write_manifest({"task": "bench-a2a"})


def written(name: str, text: str) -> Any:
    return lambda run: (run.path / name).write_text(text)


def killed_between_two_files(run: RunFolder) -> None:
    (run.path / "manifest.json").unlink()
    (run.path / "status.json").unlink()
    run.write_config(yaml.safe_dump({key: CONFIG[key] for key in ("task", "cluster")}))


def failure_of_another_form(run: RunFolder) -> None:
    run.write_job({"scheduler": "local", "id": "999999999", "environment": {}})  # more than any process id
    run.write_status(Status("running"))
    run.write_failure(Failure(0, "oom", "why", "", 0.0), attempt=0)
    (run.logs / "attempt-0" / "rank-0.failure.json").write_text('{"rank": 0}')


BROKEN = {
    "no configuration": (without_configuration, "config.yaml is missing"),
    "torn status": (written("status.json", '{"state": "comp'), "status.json is no JSON"),
    "no state": (written("status.json", '{"schema_version": 1}'), "status.json"),
    "unknown state": (written("status.json", '{"state": "asleep"}'), "asleep"),
    "attempt of another type": (written("status.json", '{"state": "failed", "attempt": "b"}'), "attempt"),
    "another schema": (written("status.json", '{"schema_version": 9}'), "status.json has schema_version 9"),
    "a list": (written("job.json", "[]"), "job.json must hold a mapping"),
    "a job of no scheduler": (written("job.json", '{"id": "1"}'), "job.json must have the scheduler"),
    "no text": (lambda run: (run.path / "manifest.json").write_bytes(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "no YAML": (written("config.yaml", "a: [1"), "config.yaml is no YAML"),
    "YAML of another thing": (written("config.yaml", "- a\n- b\n"), "config.yaml must hold a mapping"),
    "missing keys": (written("config.yaml", "task: train\nmodel: {}\n"), "config.yaml has no task.name"),
    "torn rows": (written("metrics.jsonl", '{"step": 1, "lo\n{"step": 2}\n'), "metrics.jsonl is no JSON"),
    "rows of another form": (written("metrics.jsonl", '{"epoch": 1}\n'), "its last row has no step"),
    "a folder for a file": (
        lambda run: ((run.path / "status.json").unlink(), (run.path / "status.json").mkdir()),
        "status.json cannot be read",
    ),
    "half-written": (killed_between_two_files, "config.yaml has no"),
    "a failure of another form": (failure_of_another_form, "rank-0.failure.json"),
}


def run_jobs(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs", *words])
    monkeypatch.setenv("COLUMNS", "200")
    return jobs.main()


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_read_is_listed_with_its_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole(tmp_path, "1-before")
    broken = whole(tmp_path, "2-broken")
    whole(tmp_path, "3-after")
    (tmp_path / "calibrations").mkdir()
    spoil, reason = BROKEN[name]
    spoil(broken)

    assert run_jobs(monkeypatch, "list", "--runs", str(tmp_path), "--json") == 0
    before, listed, after = json.loads(capsys.readouterr().out)
    assert (before["problem"], after["problem"]) == (None, None)
    assert (before["run_id"], listed["run_id"], after["run_id"]) == ("1-before", "2-broken", "3-after")
    assert reason in listed["problem"]
    assert set(listed) == set(before) and set(listed["status"]) == set(before["status"])

    assert run_jobs(monkeypatch, "list", "--runs", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert reason in text and all(run in text for run in ("1-before", "2-broken", "3-after"))

    assert run_jobs(monkeypatch, "status", "2-broken", "--runs", str(tmp_path)) == 0
    assert reason in capsys.readouterr().out


def test_a_run_that_nobody_waited_for_says_which_network_it_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole(tmp_path, "run")
    assert run_jobs(monkeypatch, "status", "run", "--runs", str(tmp_path)) == 0
    assert "network" not in capsys.readouterr().out, "a record of an earlier version"
    used = {"nodes": 2, "libraries": [], "interfaces": [], "fallbacks": ["NET/Socket eth0 on all 2 nodes"]}
    run.write_manifest({"user": "ada", "job": {"network": used}})
    assert run_jobs(monkeypatch, "status", "run", "--runs", str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "network  the library did not name it; no interface counted anything" in said
    assert "remark   slow network: NET/Socket eth0 on all 2 nodes" in said


def test_what_a_study_left_is_listed_with_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make bench-a2a` keeps a manifest and rows under runs/, and no configuration."""
    run = RunFolder.create(tmp_path, "bench")
    run.write_manifest({"task": "bench-a2a"})
    run.write_status(Status("completed"))
    assert run_jobs(monkeypatch, "list", "--runs", str(tmp_path), "--json") == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert (listed["task"], listed["status"]["state"], listed["model"]) == ("bench-a2a", "completed", None)
    assert run_jobs(monkeypatch, "cancel", "bench", "--runs", str(tmp_path)) == 0


def test_a_run_that_cannot_be_read_is_not_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole(tmp_path, "torn").path / "status.json").write_text("{")
    assert run_jobs(monkeypatch, "cancel", "torn", "--runs", str(tmp_path)) == 2
    assert "status.json is no JSON" in capsys.readouterr().err


def test_a_failed_run_is_shown_with_its_evidence_what_to_do_and_the_attempts_before(tmp_path, monkeypatch, capsys):
    run = whole(tmp_path, "20260101-000000-a")
    attempts.claim(run, "42.0.0", "42")
    attempts.close(run, 0, Status("failed", 0, "preempted", "preempted: 1 of 4 steps are done"), new_steps=1)
    attempts.claim(run, "42.0.1", "42")
    run.write_status(
        Status("failed", 1, "disk_full", "rank 3: [Errno 28]", 1, evidence=("rank 3 was at [checkpoint]",))
    )
    monkeypatch.setattr(sys, "argv", ["jobs", "status", "latest", "--runs", str(tmp_path)])
    assert jobs.main() == 0
    shown = capsys.readouterr().out
    assert "reason   disk_full: rank 3: [Errno 28]" in shown and "evidence rank 3 was at [checkpoint]" in shown
    assert f"python -m piper_hpc.jobs resume {run.run_id} train.checkpoint_keep=1" in shown
    assert "earlier  attempt 0, failed preempted: preempted: 1 of 4 steps are done" in shown
    monkeypatch.setattr(sys, "argv", ["jobs", "status", "latest", "--json", "--runs", str(tmp_path)])
    assert jobs.main() == 0
    document = json.loads(capsys.readouterr().out)
    assert [each["attempt"] for each in document["attempts"]] == [0, 1] and run.run_id in document["advice"]
