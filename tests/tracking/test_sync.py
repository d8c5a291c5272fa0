"""`jobs sync`: the record as wandb's own reader reads it back, sent once, continued, and kept where wandb fails."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piper_hpc import jobs
from piper_hpc.cli import replay
from piper_hpc.runs import RunFolder, Status
from tests.finished_run import STEP_S, TERM_S, make_run, metrics_row, prediction
from tests.tracking.wandb_files import history, offline_runs, read

wandb = pytest.importorskip("wandb", reason="the optional extra wandb is not installed")


def run_of(root: Path, steps: int = 4, **changes: Any) -> RunFolder:
    """A completed run with a report and a timeline."""
    run = make_run(root, [metrics_row(step) for step in range(steps)], prediction())
    run.write_manifest(run.manifest() | changes)
    run.write_report("report.md", "as predicted\n")
    (run.path / "timeline.json").write_text("[]")
    return run


def sync(monkeypatch: pytest.MonkeyPatch, root: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs", "sync", *words, "--runs", str(root)])
    return jobs.main()


def outcomes(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return json.loads(capsys.readouterr().out)["runs"]


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_replayed_once_and_a_second_sync_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = {"parallelism.micro_batch": 2}
    run = run_of(tmp_path, sweep={"name": "20260101-000000", "index": 0, "axes": axes})
    assert sync(monkeypatch, tmp_path, "--offline", "--json", "--project", "loops", "--entity", "team") == 0
    (outcome,) = outcomes(capsys)
    assert (outcome["state"], outcome["steps_added"], outcome["last_step"]) == ("synced", 4, 3)

    (files,) = offline_runs(run.path / "sync")
    records = read(files)
    shown = next(record["run"] for record in records if record["type"] == "run")
    assert (shown["run_id"], shown["project"], shown["entity"]) == (run.run_id, "loops", "team")
    assert shown["run_group"] == "20260101-000000"
    config = shown["config"]["update"]
    assert config["axes"] == axes and config["model"] == {"name": "tiny", "vocab": 256}
    rows = history(records)
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert (rows[3]["expert_s"], rows[3]["predicted/expert_s"]) == (TERM_S, 2 * TERM_S)
    summary = {
        key: value for record in records if "summary" in record for key, value in record["summary"]["update"].items()
    }
    assert summary["measured/step_time_s"] == pytest.approx(STEP_S) and summary["error_pct/expert_s"] == 100
    assert summary["status"] == "completed"
    (artifact,) = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert artifact["name"] == f"record-{run.run_id}"
    kept = {entry["path"]: Path(entry["local_path"]) for entry in artifact["manifest"]["contents"]}
    assert set(kept) == {"report.md", "timeline.json", "prediction.json"}
    assert kept["report.md"].read_text() == "as predicted\n" and files in kept["report.md"].parents

    before = bytes_of(run.path)
    assert not [
        path for path in (run.path / "sync").rglob("*") if path.lstat().st_mode & 0o077 and not path.is_symlink()
    ]
    assert sync(monkeypatch, tmp_path, "--offline", "--json", "--project", "loops", "--entity", "team") == 0
    assert [outcome["state"] for outcome in outcomes(capsys)] == ["up_to_date"]
    (run.path / "sync.json").unlink()  # the folder of wandb's files tells too
    assert sync(monkeypatch, tmp_path, "--offline", "--json", "--project", "loops", "--entity", "team") == 0
    assert [outcome["state"] for outcome in outcomes(capsys)] == ["up_to_date"]
    assert bytes_of(run.path) == {path: held for path, held in before.items() if path.name != "sync.json"}


def test_attempts_are_merged_and_what_came_since_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed after step 2, synced, and went on from a checkpoint after step 1."""
    run = run_of(tmp_path, steps=3)
    run.write_status(Status("failed", failure_class="preempted"))
    assert sync(monkeypatch, tmp_path, "--offline", "--json") == 0
    for step in (2, 3):
        run.append_metrics(metrics_row(step, loss=7.0), attempt=1)
    with (run.path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 4, "lo')  # a kill
    run.write_status(Status("completed", attempt=1))
    capsys.readouterr()
    assert sync(monkeypatch, tmp_path, "--offline", "--json") == 0
    (grown,) = outcomes(capsys)
    assert (grown["state"], grown["steps_added"], grown["last_step"]) == ("synced", 1, 3)
    assert "were done again" in grown["remark"]
    first, second = map(read, offline_runs(run.path / "sync"))
    assert [row["_step"] for row in history(first)] == [0, 1, 2]
    assert [(row["_step"], row["loss"]) for row in history(second)] == [(3, 7.0)]
    assert not [record for record in second if record["type"] == "artifact"], "the files are as they were"
    assert [record["exit"].get("exit_code", 0) for run in (first, second) for record in run if "exit" in record] == [
        1,
        0,
    ]

    # Another project has nothing yet: there the newest attempt's rows are all that is shown.
    assert sync(monkeypatch, tmp_path, "--offline", "--json", "--project", "new") == 0
    *_, whole = offline_runs(run.path / "sync")
    rows = history(read(whole))
    assert [(row["_step"], row["attempt"]) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert [target["project"] for target in run.synced()] == ["piper_hpc", "new"]


def test_a_replay_that_was_killed_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(tmp_path)
    assert sync(monkeypatch, tmp_path, "--offline") == 0
    (whole,) = offline_runs(run.path / "sync")
    (whole / replay.MARKER).unlink()
    (run.path / "sync.json").unlink()
    assert sync(monkeypatch, tmp_path, "--offline") == 0
    (again,) = offline_runs(run.path / "sync")
    assert len(history(read(again))) == 4


def test_by_default_those_are_synced_that_have_ended_and_a_sweep_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed: list[str] = []

    def fake(run: RunFolder, status: Status, target: replay.Target) -> replay.Replayed:
        replayed.append(run.run_id)
        return replay.Replayed(run.run_id, target, "synced")

    monkeypatch.setattr("piper_hpc.cli.sync.replay", fake)
    runs = [run_of(tmp_path, sweep={"name": "s", "index": index, "axes": {}} if index else None) for index in (2, 0, 1)]
    runs[2].write_status(Status("running"))
    assert sync(monkeypatch, tmp_path) == 0
    assert sorted(replayed) == sorted(run.run_id for run in runs[:2])
    replayed.clear()
    assert sync(monkeypatch, tmp_path, "s", str(runs[0].path)) == 0
    assert replayed == [runs[2].run_id, runs[0].run_id], "in the sweep's order, running or not, each once"
    assert sync(monkeypatch, tmp_path, "nothing") == 2
    assert "RUN = 'nothing'" in capsys.readouterr().err


class FakeServer:
    """wandb as it is seen from here: it keeps every step once, in ascending order, and may be cut off."""

    def __init__(self) -> None:
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.artifacts: list[str] = []
        self.down = False
        self.forgets = 0
        """How many of the last steps do not arrive."""

    def init(self, *, id: str, dir: str, resume: str, **settings: Any) -> FakeServer:
        if self.down:
            raise wandb.errors.CommError("Run initialization has timed out after 60.0 sec.")
        assert resume == "allow"
        self.rows = self.history.setdefault(id, {})
        self.run_id, self.starting_step = id, max(self.rows, default=-1) + 1
        self.dir, self.url, self.path, self.summary = f"{dir}/wandb/run/files", f"https://w/{id}", id, {}
        return self

    def log(self, row: dict[str, Any], step: int) -> None:
        assert step >= self.starting_step, "wandb would drop it"
        self.rows[step] = row

    def log_artifact(self, artifact: Any) -> None:
        if artifact.digest not in self.artifacts:
            self.artifacts.append(artifact.digest)

    def finish(self, exit_code: int) -> None:
        for step in sorted(self.rows)[len(self.rows) - self.forgets :]:
            del self.rows[step]

    def run(self, path: str) -> SimpleNamespace:
        return SimpleNamespace(lastHistoryStep=max(self.history[path], default=-1))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setattr("wandb.init", server.init)
    monkeypatch.setattr("wandb.Api", lambda timeout: server)
    monkeypatch.setattr("piper_hpc.tracking.wandb_run.ARRIVAL_LIMIT_S", 0.0)
    return server


def test_where_wandb_cannot_be_reached_nothing_counts_as_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> None:
    first, second = run_of(tmp_path), run_of(tmp_path)
    server.down = True
    assert sync(monkeypatch, tmp_path, "--json") == 1
    states = outcomes(capsys)
    assert [state["state"] for state in states] == ["failed", "not_tried"], "one wait for the network is enough"
    assert "timed out" in states[0]["problem"]
    assert first.synced() == second.synced() == []
    server.down = False
    assert sync(monkeypatch, tmp_path) == 0
    assert [len(server.history[run.run_id]) for run in (first, second)] == [4, 4]


def test_online_it_goes_on_from_what_wandb_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> None:
    run = run_of(tmp_path)
    server.forgets = 1
    assert sync(monkeypatch, tmp_path, "--json") == 1
    assert "the last step that wandb has is 2, not 3" in outcomes(capsys)[0]["problem"] and run.synced() == []
    server.forgets = 0
    assert sync(monkeypatch, tmp_path, "--json") == 0
    (rest,) = outcomes(capsys)
    assert (rest["steps_added"], rest["url"]) == (1, f"https://w/{run.run_id}")
    before = json.dumps(server.history), list(server.artifacts)
    (run.path / "sync.json").unlink()
    assert sync(monkeypatch, tmp_path, "--json", run.run_id) == 0
    assert outcomes(capsys)[0]["steps_added"] == 0
    assert (json.dumps(server.history), server.artifacts) == before and len(server.artifacts) == 1

    run.append_metrics(metrics_row(4))
    run.write_report("report.md", "grown\n")
    assert sync(monkeypatch, tmp_path, "--json", run.run_id) == 0
    assert outcomes(capsys)[0]["steps_added"] == 1
    assert sorted(server.history[run.run_id]) == [0, 1, 2, 3, 4] and len(server.artifacts) == 2
    del server.history[run.run_id]  # somebody deleted it, and it is asked for again
    run.write_status(replace(run.status(), state="failed"))
    assert sync(monkeypatch, tmp_path, run.run_id) == 0
    assert len(server.history[run.run_id]) == 5


def test_two_syncs_of_a_run_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> None:
    run = run_of(tmp_path)
    handle = os.open(run.path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert sync(monkeypatch, tmp_path) == 1
    assert "another sync" in capsys.readouterr().out and server.history == {}
    os.close(handle)
    assert sync(monkeypatch, tmp_path) == 0


def test_a_record_of_another_form_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> None:
    torn, no_steps, odd, whole = (run_of(tmp_path) for _ in range(4))
    (torn.path / "status.json").write_text("{")
    (no_steps.path / "metrics.jsonl").unlink()
    (odd.path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    assert sync(monkeypatch, tmp_path, "--json") == 1
    states = {state["run_id"]: state for state in outcomes(capsys)}
    named = [states[run.run_id]["state"] for run in (torn, no_steps, odd, whole)]
    assert named == ["failed", "no_steps", "failed", "synced"]
    assert (
        "status.json is no JSON" in states[torn.run_id]["problem"] and "cannot be read" in states[odd.run_id]["problem"]
    )


def test_without_wandb_the_command_says_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path)
    monkeypatch.setattr("piper_hpc.cli.sync.find_spec", lambda name: None)
    assert sync(monkeypatch, tmp_path) == 2
    assert "pip install wandb" in capsys.readouterr().err and run.synced() == []
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert sync(monkeypatch, tmp_path) == 2
    assert "WANDB_MODE" in capsys.readouterr().err


def test_a_run_that_holds_a_secret_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], server: FakeServer
) -> None:
    run = run_of(tmp_path)
    run.write_config((run.path / "config.yaml").read_text() + "url: https://ada:hunter22@host/data\n")
    assert sync(monkeypatch, tmp_path) == 1
    assert "config.yaml holds what looks like a secret" in capsys.readouterr().out
    assert server.history == {} and run.synced() == []
