"""The report: complete, offline, and still there in part without its optional packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.report import main
from piper_hpc.report.write import write
from piper_hpc.runs import RunFolder
from tests.finished_run import make_run, metrics_row, prediction


def test_the_page_is_one_offline_file_with_every_part(run: RunFolder) -> None:
    pytest.importorskip("plotly", reason="the optional extra report is not installed")
    page, text = write(run)
    assert (page.name, text.name) == ("report.html", "report.md")
    html = page.read_text()
    assert html.count("plotly.js v") == 1, "plotly is embedded, once"
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", outside) and "cdn" not in outside.lower()
    assert "<script src" not in html and "@import" not in outside
    for figure in ("terms", "loss", "throughput", "breakdown", "stages", "experts"):
        assert html.count(f'id="figure-{figure}"') == 1
    for fact in ("PP=2 x EP=2 x DP=1 over 4 ranks", "1.84 M parameters", "c0ffee, with local changes", "71.0 GFLOP/s"):
        assert fact in outside
    assert "measurements of &lt;local&gt;" in outside, "what comes from files is escaped"


def test_the_tables_are_in_markdown_too(run: RunFolder) -> None:
    text = write(run)[-1].read_text()
    assert text.startswith(f"# {run.run_id}: completed\n")
    assert "| expert | 20.0 ms | 10.0 ms | +100.0 % | 8.0 % |" in text
    assert "median over 8 steady of 10 steps" in text
    assert "| command | launch 'data.path=a b' |" in text


def test_bytes_by_level_stand_beside_the_predicted_ones(run: RunFolder) -> None:
    job = {"all_to_all": [{"ranks": [0, 1], "algorithm": "halo", "chunks": 2, "why": "fastest", "notes": ["near"]}]}
    run.write_manifest(run.manifest() | {"job": run.manifest()["job"] | job})
    written = [path.read_text() for path in write(run)]
    text = written[-1]
    assert "| inside nodes | 3.00 MiB | 3.00 MiB | +0.0 % |" in text
    assert "| between nodes of a rack | 1.00 MiB | 2.00 MiB | -50.0 % |" in text
    assert "between racks" not in text, "a level that nothing crossed"
    for each in written:
        assert "Dispatch and combine keep the critical stage 20.0 ms of a step of 125 ms" in each
        assert "auto took, for groups of 2 ranks, halo in 2 chunks, fastest; near" in each


def test_without_the_extra_the_markdown_stays_and_the_way_to_the_page_is_told(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    monkeypatch.delitem(sys.modules, "piper_hpc.report.figures", raising=False)
    (only,) = write(run)
    assert only.name == "report.md" and not (run.path / "report.html").exists()
    assert "plotly" in (said := capsys.readouterr().err) and "pip install plotly jinja2" in said


def test_a_run_without_prediction_is_reported(tmp_path: Path) -> None:
    text = write(make_run(tmp_path, [metrics_row(step) for step in range(4)], None))[-1].read_text()
    assert "There is no prediction" in text and "| expert | no prediction | 10.0 ms |" in text


def test_a_run_without_steps_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(make_run(tmp_path, [], prediction()).path)]) == 2
    assert "must have trained a step" in capsys.readouterr().err


def test_analysis_imports_no_torch() -> None:
    program = "import sys, analysis.report, analysis.validate; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
