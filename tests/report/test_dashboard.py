"""The dashboard: what its rows say of a sweep, and the page in a browser that has no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from piper_hpc.jobs import main as jobs
from piper_hpc.report import dashboard
from piper_hpc.report.points import Reader, regret, rows_of_runs, totals
from piper_hpc.runs import find
from tests.finished_run import prediction
from tests.sweep.made import LIMIT_BYTES, STEP_S, made_sweep

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = ("--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return made_sweep(tmp_path_factory.mktemp("swept") / "runs", kind="plan")


def test_rows_hold_what_was_predicted_measured_and_spent(sweep):
    rows = Reader(sweep).rows()
    assert [row.state for row in rows] == [*["completed"] * 7, "failed", "failed", "running", "pending", "refused"]
    third = rows[2]
    assert third.step_s == pytest.approx(1.2 * STEP_S)
    assert third.error_pct == pytest.approx(100 * (prediction()["step_time_s"] / (1.2 * STEP_S) - 1))
    assert (third.peak_bytes, third.predicted_peak_bytes, third.limit_bytes) == (2000, 1900, LIMIT_BYTES)
    assert third.spent_node_s == pytest.approx(2 * 90) and third.left_node_s == 0
    assert rows[9].left_node_s == pytest.approx(2 * 36 / 2) and rows[10].left_node_s == pytest.approx(2 * 36)
    assert rows[7].failure_class == "oom" and "OutOfMemoryError" in rows[7].log and "line 1\n" not in rows[7].log
    assert "must divide" in (rows[11].reason or "") and rows[11].run_id is None
    assert totals(rows).spent_node_hours == pytest.approx((9 * 180 + rows[9].spent_node_s) / 3600)
    assert not totals(rows).is_over
    # A point whose job was taken away waits again, and costs what is not done of it.
    lost = Reader(sweep).rows(lost={9})[9]
    assert lost.state == "pending" and lost.steps_done == 5 and lost.left_node_s == rows[9].left_node_s
    # What it spent until then is counted up to the last word of its ranks.
    (claim,) = sweep.claims()[9]
    log = sweep.run(sweep.points()[9]).log(claim.attempt, 0)
    log.touch()
    os.utime(log, (claim.owner["time_s"] + 30,) * 2)
    assert Reader(sweep).rows(lost={9})[9].spent_node_s == pytest.approx(2 * 30)


def test_regret_is_the_first_against_the_fastest(sweep):
    rows = [row for row in Reader(sweep).rows() if row.state == "completed"]
    found = regret(rows)
    assert found is not None and (found.pct, found.agreeing, found.ran) == (0, 1, 7)
    slow = {1: 0.9 * STEP_S, 3: 0.8 * STEP_S}
    other = regret([type(row)(**vars(row) | {"step_s": slow.get(row.index, row.step_s)}) for row in rows])
    assert other is not None and (other.first, other.best) == (0, 3)
    assert other.pct == pytest.approx(25)
    # (0, 1), (0, 3), (1, 3) and (2, 3) are measured the other way round.
    assert other.agreeing == pytest.approx(17 / 21)
    assert regret(rows[1:]) is None


def test_runs_have_for_axes_what_differs_between_them(tmp_path):
    sweep = made_sweep(tmp_path / "runs")
    runs = find(tmp_path / "runs")[:3]
    text = runs[1].config() | {"train": runs[1].config()["train"] | {"seed": 8}}
    runs[1].write_config(json.dumps(text))
    rows = rows_of_runs(runs)
    assert [row.axes for row in rows] == [{"train.seed": 7}, {"train.seed": 8}, {"train.seed": 7}]
    assert sweep.name not in {row.run_id for row in rows}


def test_a_page_carries_all_it_needs_and_a_value_cannot_leave_its_place(sweep, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["jobs", "dashboard", "--runs", str(sweep.runs)])
    assert jobs() == 0  # the newest sweep, into its folder
    page = (sweep.path / "dashboard.html").read_text()
    assert sweep.name in capsys.readouterr().out
    shown = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#)', shown) and "<script src" not in page
    assert "<b>padded" not in shown and "2.00 GiB &lt;/script&gt;" in shown
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert [point["index"] for point in data["points"]] == list(range(12))
    assert f'http-equiv="refresh" content="{dashboard.REFRESH_S}"' in page


def test_plotly_comes_before_the_first_figure_also_where_nothing_was_predicted(sweep):
    subject = dashboard.Subject(sweep.name, "grid", "command", str(sweep.path))
    rows = [replace(row, error_pct=None, predicted_step_s=None) for row in Reader(sweep).rows()]
    page = dashboard.page(subject, rows)
    assert 'id="figure-accuracy"' not in page
    assert page.index("plotly.js v") < page.index('id="figure-')


PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const cells = column => [...document.querySelectorAll("#points tbody tr")].map(row => row.cells[column].textContent);
  const head = name => [...document.querySelectorAll("#points th button")].find(button => button.textContent === name);
  const said = { start: cells(0) };
  head("measured").click(); head("measured").click();
  said.sorted = cells(0);
  [...document.querySelectorAll("#filters button")].find(button => button.textContent.startsWith("failed")).click();
  said.failed = cells(0);
  const drawn = [...document.querySelectorAll(".js-plotly-plot svg.main-svg")];
  said.figures = drawn.map(svg => svg.getBoundingClientRect().right);
  said.width = document.documentElement.clientWidth;
  said.scrolls = document.documentElement.scrollWidth;
  said.injected = document.querySelectorAll("td b").length;
  document.body.append(Object.assign(document.createElement("pre"), { id: "said", textContent: JSON.stringify(said) }));
}, 500));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 520], ids=["desk", "phone"])
def test_the_page_works_in_a_browser_without_network(sweep, width, tmp_path):
    subject = dashboard.Subject(sweep.name, "plan", "command", str(sweep.path))
    file = tmp_path / "page.html"
    file.write_text(dashboard.page(subject, Reader(sweep).rows()).replace("</body>", PROBE + "</body>"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    words = [str(BROWSER), *OFFLINE, profile, f"--window-size={width},1000", "--virtual-time-budget=6000", "--dump-dom"]
    shown = subprocess.run([*words, file.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    said = json.loads(re.search(r'id="said">(.*?)</pre>', shown, re.DOTALL)[1])  # type: ignore[index]
    assert said["start"] == [str(index) for index in range(12)]
    assert said["sorted"][:3] == ["9", "8", "7"] and said["sorted"][-2:] == ["10", "11"]  # unmeasured ones last
    assert said["failed"] == ["8", "7"]
    assert len(said["figures"]) >= 4 and max(said["figures"]) <= said["width"]
    assert said["scrolls"] <= said["width"] and said["injected"] == 0


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["jobs", "dashboard", "--runs", str(tmp_path)])
    assert jobs() == 2
    assert "there is no sweep" in capsys.readouterr().err
