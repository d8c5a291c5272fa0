"""The timed way of tokens to their experts and back, on real ranks; its rows, and the bars they are held to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm.family import Family
from piper_hpc.comm.levels import Places
from piper_hpc.microbench.dispatch.cells import Cell, Variant
from piper_hpc.microbench.dispatch.stages import smoke, stages
from piper_hpc.microbench.dispatch.timing import Contender, time_cells
from piper_hpc.microbench.dispatch.workloads import global_draw
from tests.processes import run_ranks

CELLS = [Cell("W0", 16, 4, 64, 8), Cell("W5", 16, 4, 32, 8)]
VARIANTS = [Variant("flat"), Variant("flat_dedup", 1), Variant("halo", 2), Variant("halo_dedup", 2)]


def timed_rows(spoiled: bool) -> list[dict[str, Any]]:
    """Rows as rank 0 has them; spoiled: halo_dedup combines to twice what it should on one rank."""
    family = Family(Places((0, 0, 1, 1), (0, 0, 0, 0)), range(4), timedelta(seconds=20))
    rows: list[dict[str, Any]] = []
    original = Contender.check

    def check(self: Contender, *given: Any) -> Any:
        result, counted = original(self, *given)
        wrong = spoiled and self.variant.algorithm == "halo_dedup" and dist.get_rank() == 3
        return result * (2 if wrong else 1), counted

    Contender.check = check  # type: ignore[method-assign]
    try:
        time_cells(
            CELLS, VARIANTS, family=family, device=torch.device("cpu"), iterations=4, budget_s=1.0,
            on_row=rows.append, link_bytes=lambda: 0, extra={"machine": "2x2"},
        )  # fmt: skip
    finally:
        Contender.check = original  # type: ignore[method-assign]
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
        assert row["n"] == len(row["samples_s"]) == 4 and 0 < row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["calibration_s"] in [sum(row["samples_s"][:4:2]) / 2]
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


@pytest.mark.processes
def test_a_wrong_result_on_one_rank_is_told() -> None:
    rows = run_ranks(4, timed_rows, True)[0]
    assert [row["correct"] for row in rows[:4]] == [True, True, True, False]


def test_the_benchmark_has_the_cells_that_it_promises() -> None:
    """Two machines and one of two racks; every size of W0 and W2, every other load; flat beside everything judged."""
    planned = {stage.name: stage for stage in stages()}
    two = [Cell(**cell) for part in planned["4x2"].parts for cell in part.cells]
    assert {cell.workload for cell in two} == {f"W{number}" for number in range(8)}
    for workload in ("W0", "W2"):
        sizes = {cell.logical_bytes for cell in two if cell.workload == workload and cell.top_k == 8}
        assert min(sizes) == 2**10 and {2**22, 2**23} <= sizes
        assert {cell.top_k for cell in two if cell.workload == workload} == {2, 4, 8}
    assert planned["4x2, 2 racks"].options["rack_mbit_per_s"] < planned["4x2, 2 racks"].options["nic_mbit_per_s"]
    assert sum(part.budget_s for stage in planned.values() for part in stage.parts) <= 1080
    assert len(smoke()) == 1
