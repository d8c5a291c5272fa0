"""The timed way of tokens to their experts and back, on real ranks; its rows, and the bars they are held to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.microbench.dispatch import suite, timing
from piper_hpc.microbench.dispatch.cells import Cell, Variant
from piper_hpc.microbench.dispatch.runner import VariantRunner
from piper_hpc.microbench.dispatch.suite import TOKENS, DispatchSuite
from piper_hpc.microbench.dispatch.timing import MIN_ITERATIONS, Bench, time_cells
from piper_hpc.spec import Layout, ModelSpec, RankMap
from piper_hpc.spec.routing_workloads import global_draw
from piper_hpc.studies.all_to_all import measure as bench
from piper_hpc.studies.all_to_all.stages import smoke, stages
from tests.processes import run_ranks

CELLS = [Cell("W0", 16, 4, 64, 8), Cell("W5", 16, 4, 32, 8)]
CPU = torch.device("cpu")
VARIANTS = [Variant("flat"), Variant("flat_dedup", 1), Variant("halo", 2), Variant("halo_dedup", 2)]


def timed_rows(spoiled: bool) -> list[dict[str, Any]]:
    """Rows as rank 0 has them; spoiled: halo_dedup combines to twice what it should on one rank."""
    family = DispatcherFactory(Places((0, 0, 1, 1), (0, 0, 0, 0)), range(4), timedelta(seconds=20))
    rows: list[dict[str, Any]] = []
    original = VariantRunner.check

    def check(self: VariantRunner, *given: Any) -> Any:
        result, counted = original(self, *given)
        wrong = spoiled and self.variant.algorithm == "halo_dedup" and dist.get_rank() == 3
        return result * (2 if wrong else 1), counted

    VariantRunner.check = check  # type: ignore[method-assign]
    try:
        bench = Bench(VARIANTS, [family], CPU, link_bytes=lambda: 0, extra={"machine": "2x2"})
        time_cells(bench, CELLS, iterations=4, budget_s=1.0, on_row=rows.append)
    finally:
        VariantRunner.check = original  # type: ignore[method-assign]
    return rows


@pytest.mark.processes
def test_rows_of_every_variant_in_every_cell() -> None:
    first, *others = run_ranks(4, timed_rows, False)
    assert others == [[], [], []], "rank 0 alone has rows"
    assert [(row["workload"], row["algorithm"], row["chunks"]) for row in first] == [
        (cell.workload, variant.algorithm, variant.chunks) for cell in CELLS for variant in VARIANTS
    ]
    for row in first:
        assert row["correct"] and row["machine"] == "2x2" and row["group"] == {"ranks": 4, "nodes": 2, "racks": 1}
        assert (
            row["n"] == len(row["samples_s"]) == MIN_ITERATIONS and 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        )
        assert row["calibration_s"] == sorted(row["samples_s"][::2])[1]
        assert row["computed_s"] > 0 and row["idle_s"] >= 0 and 0 < row["core_share"] <= 1
    flat, _, halo, dedup = first[:4]
    assert flat["logical_bytes_per_rank"] == 64 * 4 * 8 * 4
    # What flat sends between nodes, by hand: 8 experts a node, ranks hold 64 tokens each in order.
    ids = global_draw("W0", experts=16, top_k=4, tokens=256)
    node_of_token = torch.arange(256).numpy() // 128
    away = (ids // 8) != node_of_token[:, None]
    assert flat["bytes_by_level"]["rack"] == halo["bytes_by_level"]["rack"] == away.sum() * 32 / 4
    assert dedup["bytes_by_level"]["rack"] == away.any(1).sum() * 32 / 4
    assert dedup["bytes_by_level"]["rack"] == pytest.approx(dedup["formula_bytes"], rel=0.05)
    assert dedup["metadata_bytes_by_level"]["rack"] == away.sum() * 8 / 4
    assert sum(map(sum, flat["bytes_between_nodes"])) == 256 * 4 * 32


TINY = ModelSpec("tiny", 4, 16, 2, 2, 8, 8, 4, 16, 64)


def suite_rows(cell_s: float, done: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the dispatch suite on nodes of two ranks in racks of their own, as rank 0 has them; what was left out."""
    rows: list[dict[str, Any]] = []
    world = dist.get_world_size()
    ranks = RankMap.block(Layout(dp=world), 2, tuple(range(world // 2)))
    dispatch = DispatchSuite(ranks, CPU, cell_s, rows.append, done, timedelta(seconds=20))
    with mock.patch.object(suite, "ITERATIONS", MIN_ITERATIONS), mock.patch.object(timing, "REST_S", 0.0):
        dispatch.run(TINY, "float32")
    return rows, dispatch.left_out


@pytest.mark.processes
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_the_suite_covers_groups_sizes_loads_and_top_k() -> None:
    first, *others = run_ranks(4, suite_rows, 2.0, {}, timeout_s=300)
    rows, left_out = first
    assert all(not theirs for theirs, _ in others) and all(row["correct"] for row in rows)
    groups = {(row["group"]["ranks"], row["group"]["nodes"], row["concurrent_groups"]) for row in rows}
    assert groups == {(2, 1, 2), (2, 2, 2), (4, 2, 1)}, "pairs inside nodes and across, two at once, and all"
    assert {row["algorithm"] for row in rows if row["group"]["nodes"] == 1} == {"flat", "flat_dedup"}
    assert {row["workload"] for row in rows} == {f"W{number}" for number in range(8)}
    swept = {row["tokens"] for row in rows if row["workload"] == "W0" and row["top_k"] == 4}
    assert swept == set(TOKENS) and not left_out
    assert {row["top_k"] for row in rows} == {1, 2, 4}
    assert len({row["cell"] for row in rows}) == len(rows)
    # What was measured is not measured again.
    done = {row["cell"]: row for row in rows}
    assert run_ranks(4, suite_rows, 2.0, done, timeout_s=300)[0] == ([], {})


@pytest.mark.processes
def test_what_does_not_fit_the_time_box_is_left_out() -> None:
    rows, left_out = run_ranks(2, suite_rows, 1e-4, {})[0]
    assert {row["tokens"] for row in rows if row["workload"] == "W0" and row["top_k"] == 4} == {min(TOKENS)}
    assert {row["workload"] for row in rows} == {"W0"}, "no other load either, by what the first has shown"
    assert all("task.cell_s=0.0001" in reason for reason in left_out.values())
    assert any(f"/{max(TOKENS)}/" in cell and cell.startswith("dispatch/*/") for cell in left_out)


def test_uneven_nodes_have_no_closed_form_even_where_ranks_divide_over_them() -> None:
    best = Variant("halo_dedup", 8)
    assert timing._formula_bytes(CELLS[0], best, Places((0, 0, 1, 1), (0,) * 4)) is not None
    assert timing._formula_bytes(CELLS[0], best, Places((0, 0, 0, 1), (0,) * 4)) is None


def test_an_mpi_that_cannot_be_loaded_takes_no_part_and_says_why(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise RuntimeError('cannot load MPI library')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert not bench._mpi_loads()
    assert "cannot load MPI library" in capsys.readouterr().err


@pytest.mark.processes
def test_a_wrong_result_on_one_rank_is_told() -> None:
    rows = run_ranks(4, timed_rows, True)[0]
    assert [row["correct"] for row in rows[:4]] == [True, True, True, False]


def test_the_benchmark_has_the_cells_that_it_promises() -> None:
    """Two machines and one of two racks; every size of W0 and W2, and every other load."""
    planned = {stage.name: stage for stage in stages()}
    for machine in ("4x2", "4x4"):
        here = [Cell(**cell) for part in planned[machine].parts for cell in part.cells]
        assert {cell.workload for cell in here} == {f"W{number}" for number in range(8)}
        for workload in ("W0", "W2"):
            sizes = {cell.logical_bytes for cell in here if cell.workload == workload and cell.top_k == 8}
            assert {2**power for power in (10, 12, 14, 16, 18, 20, 22, 23)} <= sizes
        assert {cell.top_k for cell in here if cell.workload == "W0"} == {2, 4, 8}
    assert planned["4x2, 2 racks"].options["rack_mbit_per_s"] < planned["4x2, 2 racks"].options["nic_mbit_per_s"]
    assert sum(part.budget_s for stage in planned.values() for part in stage.parts) <= 1080
    assert len(smoke()) == 1
