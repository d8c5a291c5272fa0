"""`task.backend=mpi` on a real Slurm: MPICH under `srun --mpi=pmi2`, over the links and past them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
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
        "cluster=testbed", "task=microbench", "task.suites=[all_to_all]", "task.backend=mpi", "task.cell_s=0.05",
        *asked, cwd=folder,
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


FULL_OF_OTHER_THINGS = """
import ctypes, os
os.environ |= {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "eth0"}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [(libc.malloc(size), size) for _ in range(40) for size in range(40, 1100, 16)]
for number, (block, size) in enumerate(blocks):
    ctypes.memset(block, 0xAB, size)
    if number % 2:
        libc.free(block)
from piper_hpc.runtime import mpi
print(mpi.world(8, mpi.load().COMM_WORLD.Get_rank()).allreduce(1))
"""
"""A process whose memory has no zeros where MPI would find room."""


def test_mpi_starts_in_a_process_that_has_worked_before(slurm: Callable[..., CompletedProcess[str]]) -> None:
    ranks = ("--nodes=4", "--ntasks-per-node=2", "--mpi=pmi2", "--time=1")
    ended = slurm("srun", *ranks, sys.executable, "-c", FULL_OF_OTHER_THINGS)
    assert ended.returncode == 0 and ended.stdout.split() == ["8"] * 8, ended.stdout + ended.stderr
