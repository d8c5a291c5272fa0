"""The bars of the all-to-all benchmark on made-up rows: each can be met, missed, and not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from piper_hpc.runs import RunFolder
from piper_hpc.studies.all_to_all.__main__ import main
from piper_hpc.studies.all_to_all.rows import MeasuredCell, cells
from piper_hpc.studies.all_to_all.show import verdict_counts
from piper_hpc.studies.all_to_all.verdicts import Verdict, auto_choices, refused, verdicts

NODES, RANKS = 4, 8
PAYLOAD = 6.0e6
"""Of flat, from a node to another in one dispatch; links carry 1e8 bytes a second: 0.36 s for dispatch and combine."""


def made(
    algorithm: str, seconds: float, *, chunks: int = 0, share: float = 1.0, noise: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A row of `seconds`; share: of flat's payload."""
    matrix = np.full((NODES, NODES), share * PAYLOAD)
    samples = seconds * (1 + noise * np.array([-1, -1, 1, 1] * 2))
    row = {
        "operator": "dispatch_combine", "algorithm": algorithm, "chunks": chunks, "overlap": "far_first",
        "workload": "W0", "experts": 64, "top_k": 8, "tokens": 512, "hidden": 512, "dtype": "float32",
        "logical_bytes_per_rank": 2**23,
        "row_bytes": 2048, "group": {"ranks": RANKS, "nodes": NODES, "racks": 1}, "imbalance": 1.0, "n": 8,
        "bytes_by_level": {"node": 1e6, "rack": share * PAYLOAD * 12 / RANKS, "system": 0.0},
        "metadata_bytes_by_level": {"node": 0.0, "rack": 1e4, "system": 0.0},
        "bytes_between_nodes": matrix.tolist(), "link_bytes_by_node": [2.02 * share * 3 * PAYLOAD] * NODES,
        "formula_bytes": share * PAYLOAD * 12 / RANKS if algorithm == "halo_dedup" else None,
        "link_bytes_per_s": {"nic": 1e8, "node": 1e9}, "machine": "4x2", "correct": True, "cpu_share": 0.2,
        "samples_s": samples.tolist(), "median_s": seconds, "spread": noise, "calibration_s": seconds,
        "held_out_s": seconds,
    }  # fmt: skip
    return row | more


def judged(*rows: dict[str, Any]) -> dict[str, Verdict]:
    return {verdict.what: verdict for verdict in verdicts(cells(rows))}


def test_gain_over_flat_against_its_bar() -> None:
    good = judged(made("flat", 0.4), made("halo_dedup", 0.19, chunks=4, share=0.457), made("mpi", 0.42))
    assert good["deduplicated HALO over flat"].met and good["deduplicated HALO over flat"].value.startswith("2.11x")
    assert good["share of 1/r reached"].met and "1/r 2.19" in good["share of 1/r reached"].value
    assert good["deduplicated HALO over MPI_Alltoallv"].met and good["payload between nodes against r(N)"].met
    slow = judged(made("flat", 0.4), made("halo_dedup", 0.3, share=0.457))
    assert slow["deduplicated HALO over flat"].met is False and slow["share of 1/r reached"].met is False


def test_cell_where_flat_does_not_fill_the_links_does_not_count() -> None:
    found = judged(made("flat", 0.5), made("halo_dedup", 0.2, share=0.457))
    assert found["deduplicated HALO over flat"].met is None
    assert "flat at 72 % of the wire" in found["deduplicated HALO over flat"].note


@pytest.mark.parametrize(("seconds", "met"), [(0.42, True), (0.39, False)])
def test_where_mpi_fills_the_links_the_same_bar_holds_against_it(seconds: float, met: bool) -> None:
    rows = made("flat", 0.5), made("halo_dedup", 0.2, share=0.457), made("mpi", seconds)
    found = judged(*rows)
    assert found["deduplicated HALO over flat"].met is None
    assert found["the same over MPI's flat exchange"].met is met
    assert "the same over MPI's flat exchange" not in judged(made("flat", 0.4), *rows[1:])


def test_busiest_link_sets_the_wires_limit() -> None:
    """One node takes half of what all others send; an uplink that two nodes share binds where it is slow."""
    matrix = np.zeros((4, 4))
    matrix[1:, 0] = 1e7
    (hot,) = cells([made("flat", 1.0, bytes_between_nodes=matrix.tolist())])
    assert hot.variants[0].wire_s == pytest.approx(2 * 3e7 / 1e8)
    group, rates = {"ranks": 8, "nodes": 4, "racks": 2}, {"nic": 1e8, "rack": 5e7, "node": 1e9}
    (racks,) = cells([made("flat", 1.0, group=group, link_bytes_per_s=rates)])
    assert racks.variants[0].wire_s == pytest.approx(2 * 4 * PAYLOAD / 5e7)


def test_mpi_that_went_past_the_links_is_refused() -> None:
    past = made("mpi", 0.01, link_bytes_by_node=[1e4] * NODES)
    found = judged(made("flat", 0.4), made("halo_dedup", 0.19, share=0.457), past)
    verdict = found["deduplicated HALO over MPI_Alltoallv"]
    assert verdict.met is None and "links carried 0.00 of its bytes" in verdict.note
    (cell,) = cells([made("mpi", 0.4)])
    assert refused(cell.variants[0]) is None


def test_payload_off_the_formula_is_missed() -> None:
    row = made("halo_dedup", 0.2, share=0.457)
    row["formula_bytes"] *= 1.03
    assert judged(made("flat", 0.4), row)["payload between nodes against r(N)"].met is False


def cell(held_out: dict[str, float], calibration: dict[str, float], noise: float) -> MeasuredCell:
    rows = [
        made(name, calibration[name], noise=noise, held_out_s=held_out[name], chunks=int(name == "halo_dedup"))
        for name in held_out
    ]
    return cells(rows)[0]


@pytest.mark.parametrize(("noise", "met"), [(0.01, False), (0.2, True)])
def test_auto_chooses_by_one_half_and_is_judged_by_the_other(noise: float, met: bool) -> None:
    """It took what was 10 % slower later: too bad where times are steady, no news where they are not."""
    (choice,) = auto_choices([cell({"flat": 0.9, "halo_dedup": 1.0}, {"flat": 1.0, "halo_dedup": 0.95}, noise)])
    assert choice.chosen == "halo_dedup/1" and choice.best == "flat"
    assert choice.of_best == pytest.approx(0.9) and choice.met is met


def test_orders_of_the_phases_are_shown_and_stay_out_of_choice_and_bars() -> None:
    rows = made("flat", 0.4), made("halo_dedup", 0.2, chunks=8, share=0.457)
    quicker = made("halo_dedup", 0.1, chunks=8, share=0.457, overlap="none")
    found = judged(*rows, quicker)
    assert found["halo_dedup/8: V2 over V0"].value.startswith("0.50x")
    assert found["halo_dedup/8: V2 over V0"].met is None and verdict_counts(list(found.values())).endswith(
        "1 not judged"
    )
    assert found["deduplicated HALO over flat"].value == judged(*rows)["deduplicated HALO over flat"].value
    (choice,) = auto_choices(cells([*rows, quicker]))
    assert choice.chosen == "halo_dedup/8" and choice.best == "halo_dedup/8"


def test_a_benchmark_without_mpi_says_that_a_bar_was_not_judged() -> None:
    found = judged(made("flat", 0.4), made("halo_dedup", 0.19, share=0.457))
    assert found["deduplicated HALO over MPI_Alltoallv"].met is None
    assert "mpi4py" in found["deduplicated HALO over MPI_Alltoallv"].note


def test_a_wrong_result_is_a_missed_bar() -> None:
    found = judged(made("flat", 0.4), made("halo_dedup", 0.19, share=0.457, correct=False))
    assert found["results equal flat's"].met is False and "halo_dedup" in found["results equal flat's"].note


def test_command_shows_tables_and_writes_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path)
    run.write_manifest({"task": "bench-a2a", "command": ["bench"], "host": "here"})
    for row in (made("flat", 0.4), made("halo_dedup", 0.19, chunks=4, share=0.457)):
        run.append_measurement(row)
    assert main(["--show", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "deduplicated HALO over flat" in shown and "halo_dedup/4" in shown and "90 %" in shown
    report = (run.path / "report.md").read_text()
    assert "## All-to-all: the bars" in report and "2.11x" in report and "## All-to-all on 4x2" in report
    page = (run.path / "report.html").read_text()
    assert "<h2>All-to-all on 4x2</h2>" in page and "&gt;= 2.0x" in page
    assert main(["--show", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdicts"][0]["met"] is True


def test_run_without_the_benchmark_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path)
    run.write_manifest({})
    assert main(["--show", str(run.path)]) == 2
    assert "make bench-a2a" in capsys.readouterr().err
