"""The vendors' own benchmarks: what they print becomes rows, and how they are started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from piper_hpc.microbench import vendor
from piper_hpc.microbench.vendor import Program

# As nccl-tests 2.19 prints it for `alltoall_perf -b 1M -e 4M -f 4 -g 8`, and all_reduce_perf with one wrong value.
ALL_TO_ALL = """\
# nThread 1 nGpus 8 minBytes 1048576 maxBytes 4194304 step: 4(factor) warmup iters: 5 iters: 20 validation: 1
#
#                                                              out-of-place                       in-place
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
     1048576         32768     float    none      -1    45.20   23.20   20.30      0    44.80   23.41   20.48    N/A
     4194304        131072     float    none      -1    78.60   53.36   46.69      0    77.90   53.84   47.11    N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 33.645
"""
ALL_REDUCE = """\
     1048576        262144  bfloat16     sum      -1    38.10   27.52   48.16      3    38.00   27.59   48.29      3
"""
# osu_alltoallv -f of OSU Micro-Benchmarks 7.4: sizes are those for one peer.
OSU = """\
# OSU MPI All-to-Allv Personalized Exchange Latency Test v7.4
# Datatype: MPI_CHAR.
# Size       Avg Latency(us)   Min Latency(us)   Max Latency(us)  Iterations
1024                   35.12             30.00             40.50          20
262144               4841.70           4800.10           4900.20          20
"""


def program(operation: str, name: str, ranks: int = 8) -> Program:
    return Program(operation, f"/opt/bin/{name}", ranks, ("n1", "n2"))


def test_nccl_tests_table_becomes_rows() -> None:
    first, second = program("all_to_all", "alltoall_perf").rows(ALL_TO_ALL)
    assert (first["work"], first["median_s"], first["dtype"]) == (1048576, pytest.approx(45.2e-6), "float32")
    assert first["busbw_bytes_per_s"] / 1e9 == pytest.approx(20.30, rel=1e-3), "the (n-1)/n of an all-to-all"
    assert second["work"] == 4194304 and second["correct"] and second["backend"] == "nccl-tests"


def test_wrong_values_of_nccl_tests_are_wrong_here() -> None:
    (row,) = program("all_reduce", "all_reduce_perf").rows(ALL_REDUCE)
    assert (row["wrong"], row["correct"], row["dtype"]) == (3, False, "bfloat16")
    assert row["busbw_bytes_per_s"] / 1e9 == pytest.approx(48.16, rel=1e-3)


def test_osu_sizes_are_for_one_peer_and_its_ends_are_kept() -> None:
    small, large = program("all_to_all", "osu_alltoallv").rows(OSU)
    assert small["work"] == 8 * 1024 and large["work"] == 8 * 262144
    assert next(program("reduce_scatter", "osu_reduce_scatter").rows(OSU))["work"] == 1024, "of the whole buffer"
    assert (large["median_s"], large["min_s"], large["max_s"]) == pytest.approx((4841.7e-6, 4800.1e-6, 4900.2e-6))


def test_a_slurm_job_starts_a_step_beside_its_own() -> None:
    command = program("all_to_all", "osu_alltoallv").command(1024, 4 << 20, {"SLURM_JOB_ID": "7"})
    assert command[:6] == ["srun", "--overlap", "--nodes", "2", "--ntasks", "8"]
    assert "128:524288" in command, "bytes for one peer"
    assert program("all_reduce", "all_reduce_perf").command(1024, 4096, {})[-2:] == ["-g", "8"]


def test_a_program_on_the_path_is_found_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("mpiexec", 'shift 2; exec "$@"'), ("osu_alltoallv", f"cat <<'END'\n{OSU}END")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (only,) = vendor.found(["all_to_all", "gemm"], 4, ["n1"])
    assert [row["work"] for row in vendor.run(only, 4096, 1 << 20, timeout_s=60.0)] == [4 * 1024, 4 * 262144]
    (tmp_path / "osu_alltoallv").write_text("#!/bin/sh\necho no such device >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="exit code 3, 0 rows: no such device"):
        vendor.run(only, 4096, 1 << 20, timeout_s=60.0)
