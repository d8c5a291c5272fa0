"""Predicted against measured: the rows behind every table."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from piper_hpc.report.facts import measurement_note, rates_line
from piper_hpc.report.load import UsageError, metrics, open_run, steady
from piper_hpc.report.table import NOT_APPLICABLE, predicted_against_measured, render, with_measured_routing
from piper_hpc.report.units import count, percent, seconds, size
from piper_hpc.report.write import write
from piper_hpc.runs import RunFolder
from piper_hpc.spec import TERMS
from tests.finished_run import STEP_S, TERM_S, make_run, metrics_row, prediction, untimed


def test_every_term_then_step_time_and_memory(run: RunFolder) -> None:
    rows = predicted_against_measured(run)
    assert [row.key for row in rows] == [*TERMS, "step_time_s", "peak_memory_bytes"]
    assert [row.unit for row in rows] == ["s"] * (len(TERMS) + 1) + ["bytes"]


def test_warm_up_steps_do_not_count_and_errors_have_their_sign(run: RunFolder) -> None:
    rows = {row.key: row for row in predicted_against_measured(run)}
    assert rows["attention_s"].measured == pytest.approx(TERM_S)  # the warm-up steps took ten times as long
    assert rows["attention_s"].error_pct == pytest.approx(0.0)
    assert rows["expert_s"].error_pct == pytest.approx(100.0)
    assert rows["step_time_s"].measured == pytest.approx(STEP_S)
    assert rows["step_time_s"].error_pct == pytest.approx(100 * (TERM_S * len(TERMS) - STEP_S) / STEP_S)
    assert rows["attention_s"].share == pytest.approx(TERM_S / STEP_S)
    assert (rows["attention_s"].covered, rows["expert_s"].covered, rows["host_s"].covered) == (True, False, None)


def test_memory_is_the_largest_of_all_ranks_and_steps(run: RunFolder) -> None:
    memory = predicted_against_measured(run)[-1]
    assert (memory.predicted, memory.measured, memory.error_pct) == (1900.0, 2000.0, pytest.approx(-5.0))


def test_what_no_term_explains_is_shown_without_an_error(run: RunFolder) -> None:
    other = next(row for row in predicted_against_measured(run) if row.key == "other_s")
    assert (other.predicted, other.measured, other.error_pct) == (0.0, pytest.approx(TERM_S / 2), None)


def test_a_bubble_on_shared_cores_is_not_applicable(tmp_path: Path) -> None:
    run = make_run(tmp_path, [metrics_row(step) for step in range(4)], prediction() | {"bubble_fraction": None})
    bubble = next(row for row in predicted_against_measured(run) if row.key == "bubble_s")
    assert (bubble.predicted, bubble.error_pct, bubble.note) == (None, None, NOT_APPLICABLE)
    assert bubble.measured == pytest.approx(TERM_S)


def test_without_a_prediction_the_measured_side_stands(tmp_path: Path) -> None:
    rows = predicted_against_measured(make_run(tmp_path, [metrics_row(step) for step in range(4)], None))
    assert {row.note for row in rows} == {"no prediction"}
    assert all(row.predicted is None and row.error_pct is None and row.measured > 0 for row in rows)


def test_wall_clock_stands_beside_the_step_where_it_was_recorded(tmp_path: Path, run: RunFolder) -> None:
    wall = {"wall_s": 2 * STEP_S, "wall_tokens_per_s": 2048 / STEP_S, "wall_mfu": 0.125}
    made = make_run(tmp_path, [metrics_row(step, **wall) for step in range(4)], prediction())
    rows = predicted_against_measured(made)
    assert [row.key for row in rows] == [*TERMS, "step_time_s", "wall_s", "peak_memory_bytes"]
    assert (rows[-2].measured, rows[-2].predicted, rows[-2].error_pct) == (pytest.approx(2 * STEP_S), None, None)
    both = f"of the step: {4096 / STEP_S:,.0f} tokens/s, MFU 25.0 %"
    assert rates_line(metrics(run)) == both
    said = f"{both}; wall clock, with records and checkpoints: {2048 / STEP_S:,.0f} tokens/s, MFU 12.5 %"
    assert rates_line(metrics(made)) == said


def test_run_that_was_not_timed_has_its_step_and_memory_alone(tmp_path: Path) -> None:
    rows = [untimed(metrics_row(step)) for step in range(4)]
    made = make_run(tmp_path, rows, prediction())
    assert [row.key for row in predicted_against_measured(made)] == ["step_time_s", "peak_memory_bytes"]
    assert measurement_note(metrics(made)).endswith("terms were not timed (train.timing=false).")
    page, text = (path.read_text() for path in write(made))
    assert 'id="figure-loss"' in page and 'id="figure-stages"' not in page and "Where each step went" not in page
    assert "terms were not timed" in page and "terms were not timed" in text and "Dispatch and combine keep" not in text


def test_a_later_attempt_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    rows = [metrics_row(step) for step in range(4)] + [metrics_row(3, loss=0.5, attempt=1)]
    kept = metrics(make_run(tmp_path, rows, None))
    assert [row["step"] for row in kept] == [0, 1, 2, 3]
    assert kept[3]["loss"] == 0.5 and kept[3]["attempt"] == 1


def test_a_run_shorter_than_its_warm_up_is_taken_whole() -> None:
    assert len(steady([metrics_row(0), metrics_row(1)])) == 2
    assert len(steady([metrics_row(step) for step in range(3)])) == 1


def test_a_record_from_before_weight_gradients_were_a_term_has_none(tmp_path: Path) -> None:
    rows, predicted = [metrics_row(step) for step in range(4)], prediction()
    for terms in (predicted["terms"], *rows, *(stage for row in rows for stage in row["stages"])):
        terms.pop("weight_grad_s", None)
    old = make_run(tmp_path, rows, predicted)
    (row,) = [each for each in predicted_against_measured(old) if each.key == "weight_grad_s"]
    assert (row.measured, row.predicted, row.error_pct) == (0.0, 0.0, None)
    assert [stage["weight_grad_s"] for stage in metrics(old)[0]["stages"]] == [0.0, 0.0]


def test_a_folder_that_is_no_run_names_one_that_is(run: RunFolder) -> None:
    root = run.path.parent
    assert open_run(run.run_id, root).path == run.path
    with pytest.raises(UsageError, match=rf"RUN=nothing: .*no manifest.json.*for example {run.path}"):
        open_run("nothing", root)


def test_rendered_rows_carry_units(run: RunFolder) -> None:
    out = StringIO()
    Console(file=out, width=100).print(render(predicted_against_measured(run)))
    text = out.getvalue()
    assert "10.0 ms" in text and "1.95 KiB" in text and "+100.0 %" in text


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (seconds(1.234), "1.23 s"),
        (seconds(0.022), "22.0 ms"),
        (seconds(1.5e-4), "150 µs"),
        (seconds(0.0), "0 s"),
        (seconds(1234.5), "1,234 s"),
        (size(5.4e6), "5.15 MiB"),
        (size(12), "12 B"),
        (count(1.84e6), "1.84 M"),
        (count(7.12e10, "FLOP/s"), "71.2 GFLOP/s"),
        (percent(-12.34), "-12.3 %"),
    ],
)
def test_numbers_are_written_with_units(shown: str, text: str) -> None:
    assert shown == text


def test_a_run_is_compared_with_what_its_own_routing_was_predicted_to_take(tmp_path: Path) -> None:
    predicted = prediction()
    terms, step_s = predicted["terms"], predicted["step_time_s"]

    def at(skew: float) -> dict[str, Any]:
        slower = {term: seconds * skew for term, seconds in terms.items()}
        return {"skew": skew, "step_time_s": step_s * skew, "terms": slower, "peak_memory_bytes": [1000 * skew] * 4}

    rows = [metrics_row(step, rank_load=[1.5, 2.0] if step < 2 else [1.0, 1.5]) for step in range(6)]
    routed = {**predicted, "routing": {"mode": "dropless", "skew": 1.0, "by_skew": [at(1.0), at(2.0)]}}
    found = with_measured_routing(make_run(tmp_path / "one", rows, routed))
    assert found is not None and (found.imbalance, found.memory_imbalance) == (1.25, 1.75)
    by_key = {row.key: row for row in found.rows}
    assert by_key["step_time_s"].predicted == pytest.approx(1.25 * step_s)
    assert by_key["attention_s"].predicted == pytest.approx(1.25 * terms["attention_s"])
    assert by_key["peak_memory_bytes"].predicted == pytest.approx(1750)
    headline = {row.key: row for row in predicted_against_measured(make_run(tmp_path / "two", rows, routed))}
    assert headline["step_time_s"].predicted == pytest.approx(step_s), "what was measured feeds no prediction"
    assert with_measured_routing(make_run(tmp_path / "three", rows, predicted)) is None
