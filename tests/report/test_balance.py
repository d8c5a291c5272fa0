"""What a report says of experts that moved: a sentence, a table, and three pictures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from piper_hpc.report import balance
from piper_hpc.report.write import write
from tests.finished_run import make_run, metrics_row, prediction

LOOK = {
    "imbalance": 2.3, "after": 1.04, "bound": 1.0, "gain_s": 0.025, "held": 0.9, "horizon_steps": 5.0, "moved": 12,
    "cost_s": 0.01, "migrated": True, "bytes": 3 << 20, "seconds": 0.004, "planning_s": 0.001,
}  # fmt: skip


def rows(**look: Any) -> list[dict[str, Any]]:
    """Ten steps of two layers of four experts; after the fifth experts were looked at, and steps are faster."""
    made = [metrics_row(step, slow=1.0 if step < 5 else 0.8) for step in range(10)]
    for row in made:
        row["rank_load"] = [2.3, 1.8] if row["step"] < 5 else [1.04, 1.02]
        if row["step"] % 2:
            row["routed"] = [[9, 1, 1, 1], [3, 3, 3, 3]]
    made[4]["migration"] = LOOK | look
    return made


def test_the_sentence_has_predicted_and_measured_gain() -> None:
    line = balance.line(rows())
    assert "planned for 1 times, and experts moved 1 times: 3.00 MiB" in line
    assert re.search(r"predicted to save \+20\.0 % of a step; steps after it take -20\.0 % of those before", line)


def test_looks_without_a_move_say_so() -> None:
    assert balance.line(rows(migrated=False)) == "Loads were planned for 1 times, and no plan paid: no expert moved."
    assert balance.moves(rows(migrated=False)) == []


def test_the_report_has_table_and_pictures(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the optional extra report is not installed")
    page, text = (path.read_text() for path in write(make_run(tmp_path, rows(), prediction())))
    assert "## Balance" in text and "| 4 | 2.30 | 1.04 | 1.00 | 12 | 3.00 MiB | 5.00 ms | 25.0 ms |" in text
    for figure in ("ranks", "experts_over_time"):
        assert page.count(f'id="figure-{figure}"') == 1
    assert "12 moved" in page and "layer 1, expert 3" in page


def test_a_run_without_migration_has_none_of_it(tmp_path: Path) -> None:
    written = write(make_run(tmp_path, [metrics_row(step) for step in range(5)], prediction()))
    for path in written:
        assert "Balance" not in path.read_text() and "figure-ranks" not in path.read_text()
