"""Trackers show the record elsewhere; wandb's own reader reads back what was written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.tracking import flatten, make, with_prediction
from tests.tracking.wandb_files import history, offline_runs, read


def test_no_tracker_writes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from piper_hpc.tracking import make\n"
        f"tracker = make('none'); tracker.start({{}}, Path({str(tmp_path)!r}))\n"
        "tracker.log({'step': 0}); tracker.finish('completed')\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"tracking='mlflow'.*none, wandb_offline, wandb.*use tracking=none"):
        make("mlflow")


def test_a_missing_wandb_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "piper_hpc.tracking.wandb_run", raising=False)
    with pytest.raises(ImportError, match="pip install wandb"):
        make("wandb_offline")


def test_every_number_of_a_row_becomes_a_curve() -> None:
    row = {"step": 3, "expert_load": [1.0, 1.5], "stages": [{"bubble_s": 0.1}], "warmup": True, "reason": None}
    assert flatten(row) == {
        "step": 3,
        "expert_load/0": 1.0,
        "expert_load/1": 1.5,
        "stages/0/bubble_s": 0.1,
        "warmup": 1,
    }


def test_what_was_predicted_is_beside_what_was_measured_and_nothing_else() -> None:
    prediction = {"step_time_s": 2.0, "mfu": 0.3, "bubble_fraction": None, "terms": {"expert_s": 1.0, "bubble_s": 0.5}}
    row = {"step": 3, "step_time_s": 2.5, "mfu": 0.2, "expert_s": 1.5, "bubble_s": 0.1}
    beside = {"predicted": {"step_time_s": 2.0, "mfu": 0.3, "expert_s": 1.0}}
    assert with_prediction(row, prediction) == row | beside, "the bubble of ranks that share cores is not predicted"
    assert with_prediction({"step": 3, "mfu": 0.2}, prediction)["predicted"] == {"mfu": 0.3}, "not timed by term"
    assert with_prediction(row, None) == row


@pytest.mark.parametrize(("status", "exit_code"), [("completed", 0), ("failed", 1)])
def test_wandb_s_own_reader_reads_the_offline_run(tmp_path: Path, status: str, exit_code: int) -> None:
    pytest.importorskip("wandb", reason="the optional extra wandb is not installed")
    run_dir = tmp_path / "20260101-000000-abcd"
    run_dir.mkdir()
    tracker = make("wandb_offline", project="loops")
    tracker.start({"model": {"layers": 4}}, run_dir)
    for step, loss in enumerate([5.5, 4.25, 3.0]):
        tracker.log({"step": step, "loss": loss, "expert_load": [1.0, 1.5]})
    tracker.finish(status)

    (files,) = offline_runs(run_dir)
    records = read(files)
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_id"], run["project"]) == (run_dir.name, "loops")
    assert run["config"]["update"]["model"] == {"layers": 4}
    assert [(row["_step"], row["loss"], row["expert_load/1"]) for row in history(records)] == [
        (0, 5.5, 1.5),
        (1, 4.25, 1.5),
        (2, 3.0, 1.5),
    ]
    assert next(record["exit"] for record in records if record["type"] == "exit").get("exit_code", 0) == exit_code
