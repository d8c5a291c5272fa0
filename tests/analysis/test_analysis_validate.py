"""`python -m analysis.validate runs`: the document, the exit codes, and the messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.validate import main
from piper_hpc.runs import RunFolder, Status
from piper_hpc.spec import TERMS
from tests.finished_run import STEP_S, TERM_S, make_run, metrics_row, prediction, untimed

PREDICTED_S = TERM_S * len(TERMS)
"""Every term's time, expert twice and other not at all."""


def test_the_document_has_every_term_and_a_summary(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (compared,) = document["runs"]
    assert compared["steps"] == {"all": 10, "steady": 8}
    assert [row["key"] for row in compared["rows"]][: len(TERMS)] == list(TERMS)
    error = 100 * (PREDICTED_S - STEP_S) / STEP_S
    assert compared["step_time_error_pct"] == pytest.approx(error)
    # expert is off by one term's time, other by half of one: nothing cancels
    assert compared["terms_error_pct"] == pytest.approx(100 * 1.5 * TERM_S / STEP_S)
    summary = document["summary"]
    assert summary["step_time"]["max_abs_error_pct"] == pytest.approx(abs(error))
    assert (summary["intervals"], summary["coverage"]) == (2, 0.5)
    assert document["passed"] is None


def test_the_routing_that_was_measured_goes_by_the_records_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predicted = prediction()
    at = [{**predicted, "skew": skew} for skew in (1.0, 2.0)]
    rows = [metrics_row(step, rank_load=[1.0, 1.5]) for step in range(4)]
    routed = make_run(tmp_path, rows, {**predicted, "routing": {"by_skew": at}})
    assert main(["runs", str(routed.path), "--json"]) == 0
    (compared,) = json.loads(capsys.readouterr().out)["runs"]
    found = compared["measured_routing"]
    assert set(found) == {"skew", "memory_skew", "rows"}
    assert (found["skew"], found["memory_skew"]) == (1.25, 1.25)
    assert [row["key"] for row in found["rows"]] == [row["key"] for row in compared["rows"]]


def test_two_runs_are_summarised_together(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slower = make_run(tmp_path / "other", [metrics_row(step, slow=2.0) for step in range(6)], prediction())
    assert main(["runs", str(run.path), str(slower.path), "--json"]) == 0
    step_time = json.loads(capsys.readouterr().out)["summary"]["step_time"]
    errors = [abs(PREDICTED_S - STEP_S) / STEP_S, abs(PREDICTED_S - 2 * STEP_S) / (2 * STEP_S)]
    assert step_time["n"] == 2
    assert step_time["mean_abs_error_pct"] == pytest.approx(100 * sum(errors) / 2)


def test_run_that_was_not_timed_is_judged_by_its_step_alone(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [untimed(metrics_row(step)) for step in range(4)]
    plain = make_run(tmp_path / "untimed", rows, prediction())
    assert main(["runs", str(plain.path)]) == 0
    assert "terms were not timed" in capsys.readouterr().out
    assert main(["runs", str(run.path), str(plain.path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    timed, alone = (each["terms_error_pct"] for each in document["runs"])
    assert alone is None and document["summary"]["terms_error_pct"] == timed
    assert document["runs"][1]["step_time_error_pct"] is not None


def test_a_tolerance_decides_the_exit_code(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run.path), "--tolerance", "5"]) == 0
    assert "[  OK  ]" in capsys.readouterr().out
    assert main(["runs", str(run.path), "--tolerance", "1"]) == 1
    assert "[ FAIL ]" in capsys.readouterr().out
    assert main(["runs", str(run.path), "--tolerance", "1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_questions_without_an_answer_end_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "nowhere")]) == 2
    assert "must be a run's folder" in capsys.readouterr().err
    unpredicted = make_run(tmp_path / "a", [metrics_row(0)], None)
    assert main(["runs", str(unpredicted.path)]) == 2
    assert "must have a prediction" in capsys.readouterr().err
    untrained = make_run(tmp_path / "b", [], prediction())
    assert main(["runs", str(untrained.path)]) == 2
    assert "must have trained a step" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["runs", "x", "--tolerance", "-1"], ["public"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_without_a_name_all_comparable_runs_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else lies in `runs/` is no mistake of the asker: calibrations, micro-benchmarks, failed runs."""
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 2
    assert "no completed training run" in capsys.readouterr().err
    compared = make_run(tmp_path / "runs", [metrics_row(step) for step in range(4)], prediction())
    compared.write_manifest({})
    compared.write_status(Status("completed"))
    failed = make_run(tmp_path / "runs", [metrics_row(step) for step in range(4)], prediction())
    failed.write_manifest({})
    failed.write_status(Status("failed", failure_class="oom"))
    (tmp_path / "runs" / "calibrations").mkdir()
    assert main(["runs", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["runs"]
    assert only["run_id"] == compared.run_id


def test_folders_that_cannot_be_read_are_skipped_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torn, or of another form; named, the latter is an error of the asker."""
    monkeypatch.chdir(tmp_path)
    compared = make_run(tmp_path / "runs", [metrics_row(step) for step in range(4)], prediction())
    torn = make_run(tmp_path / "runs", [metrics_row(step) for step in range(4)], prediction())
    (torn.path / "status.json").write_text("{")
    other_keys = make_run(tmp_path / "runs", [{"step": 0, "loss": 1.0}], {"layout": {}})
    study = RunFolder.create(tmp_path / "runs")
    study.write_manifest({"task": "bench-a2a"})
    study.write_status(Status("completed"))
    assert main(["runs", "--json"]) == 0
    printed = capsys.readouterr()
    (only,) = json.loads(printed.out)["runs"]
    assert only["run_id"] == compared.run_id
    assert f"skipped {torn.run_id}: status.json is no JSON" in printed.err
    assert f"skipped RUN={other_keys.path}: its record cannot be read" in printed.err
    assert main(["runs", str(other_keys.path)]) == 2
    assert "KeyError" in capsys.readouterr().err
