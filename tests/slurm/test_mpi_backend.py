"""`task.backend=mpi` on a real Slurm: MPICH under `srun --mpi=pmi2`, over the links and past them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piper_hpc.runs import find
from piper_hpc.testbed.state import Testbed
from tests.live import start

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(400)]


def measured(folder: Path, *variables: str) -> list[dict[str, Any]]:
    """Rows of all_to_all among eight ranks on four nodes, by MPI."""
    asked = [f"+cluster.environment.{each}" for each in ("SLURM_MPI_TYPE=pmi2", *variables)]
    launcher = start(
        "cluster=testbed", "task=microbench", "task.suites=[all_to_all]", "task.backend=mpi", "task.cell_s=0.05", *asked,
        cwd=folder,
    )  # fmt: skip
    output, errors = launcher.communicate(timeout=180)
    assert launcher.returncode == 0, output + errors
    return find(folder / "runs")[-1].measurements()


def test_rows_of_mpi_count_only_where_the_links_carried_them(testbed: Testbed, tmp_path: Path) -> None:
    on_links = measured(tmp_path, "UCX_TLS='tcp,self'", "UCX_NET_DEVICES=eth0")
    assert on_links and all(row["correct"] and "refused" not in row for row in on_links)
    assert {row["backend"] for row in on_links} == {"mpi"} and "MPICH" in on_links[0]["library"]
    past_them = measured(tmp_path)  # as MPICH does by itself, which takes all nodes for one host
    large = [row for row in past_them if row["tier"] != "node" and row["work"] >= 2**18]
    assert large and all("took another way" in row["refused"] and not row["correct"] for row in large)
