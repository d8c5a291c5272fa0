"""The simulated Frontier study: its constants have sources, and what its text claims, its figures show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.studies.frontier_all_to_all import show, study
from piper_hpc.studies.frontier_all_to_all.__main__ import main
from piper_hpc.studies.frontier_all_to_all.study import FIG_8, VARIANTS, Machine


@pytest.fixture(scope="module")
def on() -> Machine:
    return study.machine()


@pytest.fixture(scope="module")
def points(on: Machine) -> list[study.Point]:
    return study.points(on)


def test_every_constant_has_a_source(on: Machine) -> None:
    assert {each.name for each in on.constants} >= {"latency_s of link system", "bytes_per_s of link node", "experts"}
    assert all(each.source and each.value > 0 for each in on.constants)


def test_two_levels_by_hand(on: Machine) -> None:
    """16 nodes of 8 with 1 MB a pair, from the formulas of Algorithm 1's phases on links of 12.5, 50 and 200 GB/s."""
    pair, far, near, beside = 1e6, 15.1e-6, 3.6e-6, 7
    flat = 120 * (far + pair / 12.5e9) + beside * near + pair * (1 / 200e9 + 6 / 50e9)
    between = 15 * (far + 8 * pair / 12.5e9)
    onward = beside * near + 15 * pair * (1 / 200e9 + 6 / 50e9)
    halo = between + onward + 2 * 128 * pair * 2 / 1.638e12
    found = study.point(on, 16, 128 * pair).seconds
    assert found["flat"] == pytest.approx(flat) and found["HALO V1, V2"] == pytest.approx(halo)
    assert found["HALO V0"] > found["HALO V1, V2"]


def test_what_the_text_reads_from_the_figures(points: list[study.Point]) -> None:
    for panel in FIG_8:
        axis = [point for point in points if point.nodes == panel.nodes]
        assert [round(end / 1e6, 1) for end in (axis[0].buffer_bytes, axis[-1].buffer_bytes)] == pytest.approx(
            [panel.least_mb, panel.most_mb]
        )
        assert axis[0].speedup("HALO V1, V2") > 4 and axis[-1].best(dedup=False) == "flat"
        assert axis[0].best(dedup=False) == "3 levels"
        assert "3 levels" not in {point.best(dedup=False) for point in axis[1:]}
        assert all(point.speedup("flat dedup") == pytest.approx(1.0, abs=0.03) for point in axis)
        spared = max(1 - point.seconds["HALO dedup"] / point.seconds["HALO V1, V2"] for point in axis)
        assert spared > 0.06 if panel.nodes <= 32 else spared < 0.05


def test_a_crossover_parts_winners(on: Machine) -> None:
    for nodes in (16, 512):
        size = study.crossover_bytes(on, nodes, "HALO V1, V2")
        assert size is not None
        assert study.point(on, nodes, 0.9 * size).speedup("HALO V1, V2") > 1
        assert study.point(on, nodes, 1.1 * size).speedup("HALO V1, V2") < 1


def test_the_papers_eight_is_out_of_reach_of_fewer_messages(on: Machine) -> None:
    """Eight ranks a node bound the gain of two levels by eight; at the largest size no latency gives the ratio."""
    beside = {each.nodes: each for each in study.compare_with_paper(on)}
    assert all(each.most < 5 for each in beside.values())
    low, middle, high = beside[32].needed_s
    assert low is not None and low > 1e-3 and middle is not None and middle > low and high is None
    at = on.with_latency(beside[64].needed_s[0] or 0.0)
    assert study.point(at, 64, 8.4e6).speedup("HALO V1, V2") == pytest.approx(4.44, rel=1e-6)


@pytest.mark.slow
def test_the_command_prints_one_document_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "study.md"
    assert main(["--json", "--markdown", str(page)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["simulated"] is True and len(document["points"]) == len(FIG_8) * study.POINTS
    assert set(document["points"][0]["seconds"]) == {variant.name for variant in VARIANTS}
    assert len(document["sensitivity"]) == len(FIG_8) * len(study.LATENCIES_S)
    text = page.read_text()
    assert show.TITLE in text and "arXiv 2605.05049" in text
    kept = (Path(__file__).parents[2] / "docs" / "frontier_all_to_all.md").read_text()
    assert text == kept, (
        "write it again: python -m piper_hpc.studies.frontier_all_to_all --markdown docs/frontier_all_to_all.md"
    )


def test_a_page_in_no_folder_is_bad_input(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "piper_hpc.studies.frontier_all_to_all",
        "--markdown",
        str(tmp_path / "no" / "page.md"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        answer.returncode == 2 and "--markdown" in answer.stderr and "this works: --markdown page.md" in answer.stderr
    )
