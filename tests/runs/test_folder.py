"""The record survives kills, keeps its rows in order, and stays private."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from piper_hpc.runs import Failure, RunFolder, Status, find, manifest, new_run_id
from piper_hpc.runs.checkpoints import new_folder


def test_ids_sort_by_time_and_do_not_collide():
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert all(len(name) == len(ids[0]) for name in ids)


def test_a_folder_is_private_and_found_by_its_manifest(tmp_path):
    run = RunFolder.create(tmp_path)
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert find(tmp_path) == []
    run.write_manifest({"user": "ada"})
    assert [found.run_id for found in find(tmp_path)] == [run.run_id]


def test_rows_carry_schema_and_attempt_and_a_torn_last_line_is_left_out(tmp_path):
    run = RunFolder.create(tmp_path)
    run.append_metrics({"step": 1, "loss": 5.5})
    run.append_metrics({"step": 2, "loss": 5.0}, attempt=1)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert run.metrics() == [
        {"schema_version": 1, "attempt": 0, "step": 1, "loss": 5.5},
        {"schema_version": 1, "attempt": 1, "step": 2, "loss": 5.0},
    ]


def test_a_number_that_json_lacks_becomes_null(tmp_path):
    run = RunFolder.create(tmp_path)
    run.append_metrics({"loss": float("nan"), "terms": [1.0, float("inf")]})
    (row,) = run.metrics()
    assert (row["loss"], row["terms"]) == (None, [1.0, None])


def test_a_word_that_is_no_state_is_refused():
    with pytest.raises(ValueError, match="finished"):
        Status("finished")


def test_status_round_trip_and_default(tmp_path):
    run = RunFolder.create(tmp_path)
    assert run.status().state == "pending"
    run.write_status(Status("failed", attempt=1, failure_class="oom", reason="rank 3"))
    status = run.status()
    assert (status.state, status.failure_class, status.attempt, status.ended) == ("failed", "oom", 1, True)
    assert status.updated.endswith("Z")
    assert json.loads((run.path / "status.json").read_text())["schema_version"] == 1


def test_the_first_failure_comes_first(tmp_path):
    run = RunFolder.create(tmp_path)
    run.write_failure(Failure(3, "comm", "peer closed", "", time_s=20.0), attempt=0)
    run.write_failure(Failure(1, "oom", "no memory", "", time_s=10.0), attempt=0)
    assert [failure.rank for failure in run.failures(0)] == [1, 3]
    assert run.failures(1) == []


def modes(folder: Path) -> set[int]:
    """Of all files below a folder."""
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
@pytest.mark.parametrize(("mode", "of_files"), [(0o700, 0o600), (0o750, 0o640), (0o770, 0o660)])
def test_all_that_a_run_holds_follows_its_folders_mode(tmp_path, umask, mode, of_files):
    before = os.umask(umask)
    try:
        run = RunFolder.create(tmp_path / "runs", mode=mode)
        run.write_manifest({"user": "ada"})
        run.write_status(Status("running"))
        run.write_status(Status("completed"))
        run.append_metrics({"step": 1})
        run.write_routed(np.zeros((1, 1, 1, 1), np.int32))
        again = RunFolder(run.path)  # as a rank opens it, which is told no mode
        again.write_failure(Failure(0, "oom", "why", "", 1.0), attempt=1)
        again.append_measurement({"work": 1})
        with again.own_umask():
            again.log(1, 0).touch()
            new_folder(again.checkpoints, 3).joinpath("rank-0.safetensors").touch()
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert modes(run.path) == {of_files}
    folders = [run.path, *(path for path in run.path.rglob("*") if path.is_dir())]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {mode} and len(folders) == 5
    assert (tmp_path / "runs").stat().st_mode & 0o070 & mode == mode & 0o070, "the group comes as far as the run"


def test_a_shared_projects_group_stays(tmp_path):
    tmp_path.chmod(0o2770)
    run = RunFolder.create(tmp_path, mode=0o770)
    run.write_failure(Failure(0, "oom", "why", "", 1.0), attempt=0)
    for folder in (run.path, run.logs, run.logs / "attempt-0"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o2770


def test_a_runs_root_that_was_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o700)
    RunFolder.create(tmp_path, mode=0o770)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_what_the_record_keeps_of_the_environment_and_the_command_has_no_secret(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("UCX_AUTH_TOKEN", "hunter2")
    monkeypatch.setenv("NCCL_PROXY", "http://ada:hunter2@proxy")
    monkeypatch.setattr("sys.argv", ["launch", "train.steps=2", "+a.MY_TOKEN=hunter2"])
    kept = manifest.provenance()
    assert "hunter2" not in json.dumps(kept)
    assert kept["environment"]["NCCL_DEBUG"] == "INFO" and kept["command"][:2] == ["launch", "train.steps=2"]
