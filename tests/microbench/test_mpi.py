"""MPI as the vendor's reference: its exchanges on four real ranks, and what is said where it cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MPIEXEC = Path(sys.executable).parent / "mpiexec"
"""Of the MPICH wheel that `pip install 'piper-hpc[test]'` brings."""

pytestmark = [pytest.mark.processes, pytest.mark.alone]  # ranks of MPI spin: beside others four take minutes for 20 s


def python(*words: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, where MPI can be started: under mpiexec for one rank or more."""
    started = [str(MPIEXEC), "-n", str(ranks)] if ranks else []
    command = [*started, sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ended = python("-m", "tests.microbench.mpi_program", str(tmp_path_factory.mktemp("mpi")), ranks=4)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return json.loads(ended.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def test_every_exchange_of_mpi_is_right(told: dict[str, Any]) -> None:
    rows = told["rows"]
    assert {row["operator"].split("/")[0] for row in rows} == {
        *("p2p", "p2p_concurrent", "all_reduce", "reduce_scatter", "all_gather", "all_to_all")
    }
    for row in rows:
        assert row["correct"] and row["wrong"] == 0 and row["backend"] == "mpi", row["cell"]
        assert "MPICH" in row["library"] and row["median_s"] > 0
    assert {row["group_size"] for row in rows if row["operator"].startswith("all_to_all")} == {2, 4}


def test_uneven_rows_and_counts_arrive_as_by_gloo(told: dict[str, Any]) -> None:
    assert told["agree"] == [True] * 4


def test_ranks_that_mpi_does_not_see_are_told_with_what_to_do() -> None:
    alone = python("-c", "from piper_hpc.runtime import mpi; mpi.world(4, 0)", ranks=1)
    assert alone.returncode != 0
    assert "MPI sees 1 ranks, the job has 4" in alone.stderr and "SLURM_MPI_TYPE=pmi2" in alone.stderr


def test_without_mpi4py_the_message_names_it() -> None:
    missing = python("-c", "import sys; sys.modules['mpi4py'] = None; from piper_hpc.runtime import mpi; mpi.load()")
    assert missing.returncode != 0
    assert "needs mpi4py" in missing.stderr and "task.backend=torch needs neither" in missing.stderr


def test_a_library_that_only_its_first_thread_may_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    (tmp_path / "mpi4py" / "MPI.py").write_text(
        "THREAD_SERIALIZED = 2\n"
        "def Query_thread(): return 1\n"
        "def Get_library_version(): return 'An MPI of one thread'\n"
    )  # fmt: skip
    load = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from piper_hpc.runtime import mpi; mpi.load()"
    refused = python("-c", load)
    assert refused.returncode != 0
    assert "MPI_THREAD_SERIALIZED" in refused.stderr and "An MPI of one thread" in refused.stderr
