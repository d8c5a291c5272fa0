"""No command that reads a run ends in a traceback, whatever a kill, another version or another program left in it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from analysis import report as report_command
from analysis import validate
from piper_hpc import jobs
from piper_hpc.cli.errors import run_command
from piper_hpc.cluster.resume import resumed_rows
from piper_hpc.runs import Failure, RecordError, RunFolder, Status
from piper_hpc.runs.checkpoints import CheckpointError, Sidecar
from piper_hpc.studies.ablation import __main__ as ablation
from piper_hpc.studies.all_to_all import __main__ as all_to_all
from piper_hpc.studies.headline import __main__ as headline
from piper_hpc.studies.own_runs import __main__ as own_runs
from piper_hpc.submit import outcome
from tests import full
from tests.finished_run import make_run, metrics_row, prediction

FILES = (
    *("config.yaml", "manifest.json", "job.json", "prediction.json", "status.json", "end.json", "metrics.jsonl"),
    *("measurements.jsonl", "timeline.json", "logs/attempt-0/rank-0.failure.json"),
)
DAMAGES: dict[str, bytes | None] = {
    "another version": b'{"schema_version": 99, "attempt": 0}\n',
    "a version of another type": b'{"schema_version": "two"}\n',
    "torn": b'{"schema_version": 1, "sta',
    "torn and a line": b'{"schema_version": 1, "sta\n',
    "empty": b"",
    "a list": b"[1, 2]\n",
    "null": b"null\n",
    "a number": b"3\n",
    "no text": b"\xff\xfe\x00\x81",
    "foreign": b'{"epoch": 3, "state": {"a": 1}, "step": "two", "attempt": "b", "cluster": [], "job": 7}\n',
    "deep": b"[" * 5000,
    "a folder": None,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every file that the commands read."""
    rows = [metrics_row(step) for step in range(4)]
    run = make_run(tmp_path_factory.mktemp("runs"), rows, prediction())
    run.write_job({"scheduler": "local", "id": "999999999", "environment": {}})
    run.append_measurement({"operator": "gemm", "work": 1.0, "correct": True, "benchmark_version": 1, "cell": "x"})
    run.write_failure(Failure(0, "oom", "why", "", 1.0), attempt=0)
    run.log(0, 0).write_text("a line\n")
    run.write_status(Status("completed"))
    return run.path


def jobs_command(*words: str) -> Callable[[Path, pytest.MonkeyPatch], int]:
    def call(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
        where = ["--runs", str(path.parent)]
        named = [] if words[0] == "list" else [str(path)]
        monkeypatch.setattr(sys, "argv", ["jobs", words[0], *named, *words[1:], *where])
        return jobs.main()

    return call


def task_resume(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    cluster = SimpleNamespace(name="local", nodes=1, ranks_per_node=4, device="cpu")
    experiment: Any = SimpleNamespace(
        task=SimpleNamespace(resume=str(path)),
        runs=path.parent,
        cluster=cluster,
        train=SimpleNamespace(dtype="float32"),
    )
    machine: Any = SimpleNamespace(fingerprint={})
    return run_command(lambda: len(resumed_rows(experiment, machine)) * 0)


OF_JOBS = {
    **{word: jobs_command(word) for word in ("list", "status", "logs", "wait", "cancel")},
    "status --json": jobs_command("status", "--json"),
    "logs -f": jobs_command("logs", "-f", "--rank", "all"),
}
COMMANDS: dict[str, Callable[[Path, pytest.MonkeyPatch], int]] = {
    **OF_JOBS,
    "report": lambda path, _: report_command.main([str(path)]),
    "validate": lambda path, _: validate.main(["runs", str(path)]),
    "replay": lambda path, _: validate.main(["replay", str(path)]),
    "all_to_all --show": lambda path, _: all_to_all.main(["--show", str(path)]),
    "headline --show": lambda path, _: headline.main(["--show", str(path)]),
    "own_runs --show": lambda path, _: own_runs.main(["--show", str(path)]),
    "ablation --show": lambda path, _: ablation.main(["--show", str(path)]),
    "task.resume": task_resume,
}


def damage(file: Path, what: bytes | None) -> None:
    file.unlink(missing_ok=True)
    if what is None:
        file.mkdir(parents=True)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(what)


def examined(command: str, file: str) -> dict[str, bytes | None]:
    """Of a file's damages those that this command meets: a third, so that each command meets every damage in some file,
    and each file's every damage meets five commands; with `--full` all."""
    turn = list(COMMANDS).index(command) + FILES.index(file)
    return {name: what for index, (name, what) in enumerate(DAMAGES.items()) if full.ALL or (index + turn) % 3 == 0}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_ends_no_command_in_a_traceback(
    command: str,
    file: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sleeps = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        assert len(sleeps) < 1000, "it waits for ever"

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(outcome, "LAST_WORD_S", 0.0)
    for name, what in examined(command, file).items():
        for state in ("completed", "running") if command in OF_JOBS else ("completed",):
            path = tmp_path / f"{name}-{state}".replace(" ", "-") / "a-run"
            shutil.copytree(whole, path)
            if state == "running":
                RunFolder(path).write_status(Status("running"))
            damage(path / file, what)
            code = COMMANDS[command](path, monkeypatch)
            printed = capsys.readouterr()
            assert code in (0, 1, 2), name
            assert "Traceback" not in printed.err
            if code == 2:
                assert "error: " in printed.err and len(printed.err.splitlines()) < 5, name
            elif command.endswith("--json"):
                json.loads(printed.out)


@pytest.mark.parametrize("what", [b"", b"PK\x03\x04torn", b"[1]"])
def test_counts_of_a_router_that_are_torn_are_an_error_of_the_record(what: bytes, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    (run.path / "routed.npz").write_bytes(what)
    with pytest.raises(RecordError, match="routed"):
        run.routed()


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "a folder"])
def test_a_damaged_checkpoint_is_no_traceback(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.json").write_bytes(DAMAGES[name] or b"")
    with pytest.raises(CheckpointError, match="checkpoint"):
        Sidecar.read(tmp_path)
