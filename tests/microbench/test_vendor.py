"""The vendors' own benchmarks: what they print becomes rows, and how they are started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from piper_hpc.microbench import vendor
from piper_hpc.microbench.links import LinkCounter
from piper_hpc.microbench.vendor import Program, TableError
from piper_hpc.microbench.vendor_suite import VendorSuite
from tests.processes import run_ranks


def head(ranks: int) -> str:
    """What nccl-tests 2.19 prints before its table: of one world, or of each rank's own without MPI."""
    devices = [
        f"#  Rank {rank:2d} Group  0 Pid {798 + rank:6d} on  hw14 device {rank:2d} [0x0f] H800" for rank in range(ranks)
    ]
    return "\n".join(("# nThread 1 nGpus 1 minBytes 1048576 validation: 1", "#", "# Using devices", *devices, "#", ""))


# Tables of `alltoall_perf -b 1M -e 4M -f 4` on 8 ranks, of 1 rank, and of all_reduce_perf with wrong values.
ALL_TO_ALL = """\
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
ALONE = """\
     1048576       1048576     float    none      -1     6.10  171.90    0.00      0     6.05  173.32    0.00    N/A
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
    first, second = program("all_to_all", "alltoall_perf").rows(head(8) + ALL_TO_ALL)
    assert (first["work"], first["median_s"], first["dtype"]) == (1048576, pytest.approx(45.2e-6), "float32")
    assert first["busbw_bytes_per_s"] / 1e9 == pytest.approx(20.30, rel=1e-3), "the (n-1)/n of an all-to-all"
    assert second["work"] == 4194304 and second["correct"] and second["backend"] == "nccl-tests"


def test_wrong_values_of_nccl_tests_are_wrong_here() -> None:
    (row,) = program("all_reduce", "all_reduce_perf").rows(head(8) + ALL_REDUCE)
    assert (row["wrong"], row["correct"], row["dtype"]) == (3, False, "bfloat16")
    assert row["busbw_bytes_per_s"] / 1e9 == pytest.approx(48.16, rel=1e-3)


def test_osu_sizes_are_for_one_peer_and_its_ends_are_kept() -> None:
    small, large = program("all_to_all", "osu_alltoallv").rows(OSU)
    assert small["work"] == 8 * 1024 and large["work"] == 8 * 262144
    assert next(program("reduce_scatter", "osu_reduce_scatter").rows(OSU))["work"] == 1024, "of the whole buffer"
    assert (large["median_s"], large["min_s"], large["max_s"]) == pytest.approx((4841.7e-6, 4800.1e-6, 4900.2e-6))


def test_a_slurm_job_starts_a_step_beside_its_own() -> None:
    command = program("all_to_all", "osu_alltoallv").command(1024, 4 << 20, {"SLURM_JOB_ID": "7"})
    assert command[:6] == ["srun", "--overlap", "--nodes=2", "--nodelist=n1,n2", "--ntasks=8", "--ntasks-per-node=4"]
    assert "128:524288" in command, "bytes for one peer"
    assert program("all_reduce", "all_reduce_perf").command(1024, 4096, {})[-2:] == ["-g", "8"]


def test_the_type_of_mpi_is_the_job_s() -> None:
    of_job = {"SLURM_JOB_ID": "7", "SLURM_MPI_TYPE": "pmi2"}
    assert "--mpi=pmi2" in program("all_to_all", "alltoall_perf").command(1024, 4096, of_job)


def test_a_message_goes_between_two_nodes_where_there_are_two() -> None:
    latency = Program("p2p", "/opt/bin/osu_latency", 16, ("n1", "n2", "n3", "n4"))
    command = latency.command(1024, 4096, {"SLURM_JOB_ID": "7"})
    assert command[2:6] == ["--nodes=2", "--nodelist=n1,n2", "--ntasks=2", "--ntasks-per-node=1"]
    (row,) = latency.rows("# Size       Avg Latency(us)\n1024    12.5\n")
    assert (row["nodes"], row["ranks"]) == (["n1", "n2"], [0, 1])


def test_tables_of_ranks_that_did_not_meet_are_refused() -> None:
    eight = program("all_to_all", "alltoall_perf")
    with pytest.raises(TableError, match=r"8 tables of 1 ranks, not of 8 ranks together.*make MPI=1.*SLURM_MPI_TYPE"):
        list(eight.rows((head(1) + ALONE) * 8))
    with pytest.raises(TableError, match="it tells of 4 ranks, not of 8"):
        list(eight.rows(head(4) + ALL_TO_ALL))
    with pytest.raises(TableError, match="it tells of 0 ranks, not of 8"):
        list(eight.rows(ALL_TO_ALL))
    with pytest.raises(TableError, match="2 tables of 4 ranks"):
        list(eight.rows((head(4) + ALL_TO_ALL) * 2))
    with pytest.raises(TableError, match="it tells of 2 tables, not of 8"):
        list(program("all_to_all", "osu_alltoallv").rows(OSU * 2))


def test_a_bus_bandwidth_of_other_ranks_is_refused() -> None:
    with pytest.raises(TableError, match=r"bus bandwidth of 0 GB/s at 1048576 bytes, where 8 ranks make 150.4"):
        list(program("all_to_all", "alltoall_perf").rows(head(8) + ALONE))


def test_what_rows_must_move_between_nodes() -> None:
    def moved(operation: str, name: str, text: str, ranks: int = 8, nodes: int = 2) -> float:
        of = Program(operation, name, ranks, tuple(f"n{node}" for node in range(nodes)))
        return of.minimum_bytes(list(of.rows(text)))

    # 20 iterations; each of 8 ranks sends half of its buffer to the other node.
    assert moved("all_to_all", "alltoall_perf", head(8) + ALL_TO_ALL) == 20 * 8 * (1048576 + 4194304) / 2
    assert moved("all_reduce", "all_reduce_perf", head(8) + ALL_REDUCE) == 20 * 2 * 1048576
    assert moved("all_to_all", "osu_alltoallv", OSU) == 20 * 8 * 8 * (1024 + 262144) / 2
    assert moved("all_to_all", "osu_alltoallv", OSU, nodes=1) == 0
    # A ring over four nodes leaves each of them once; a message goes there and back.
    ring = "     1048576        262144     float    none      -1    38.10   27.52   27.52      0\n"
    assert moved("p2p", "sendrecv_perf", head(8) + ring, nodes=4) == 20 * 4 * 1048576
    assert moved("p2p", "osu_latency", "1048576  38.10\n", nodes=4) == 20 * 2 * 1048576
    # OSU says how many iterations it made, where it made fewer or more.
    assert moved("all_to_all", "osu_alltoallv", "1024 35.12 30.00 40.50 100\n") == 100 * 8 * 8 * 1024 / 2


def test_a_program_on_the_path_is_found_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("mpiexec", 'shift 2; exec "$@"'), ("osu_alltoallv", f"cat <<'END'\n{OSU}END")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (only,) = vendor.find_programs(["all_to_all", "gemm"], 4, ["n1"])
    assert [row["work"] for row in vendor.run(only, 4096, 1 << 20, timeout_s=60.0)] == [4 * 1024, 4 * 262144]
    (tmp_path / "osu_alltoallv").write_text("#!/bin/sh\necho no such device >&2; exit 3\n")
    with pytest.raises(RuntimeError, match="exit code 3: no such device"):
        vendor.run(only, 4096, 1 << 20, timeout_s=60.0)


PROGRAMS = {
    "mpiexec": 'shift 2; exec "$@"',
    "osu_alltoallv": f"echo $SENT >> $LINK; cat <<'END'\n{OSU}END",
    "osu_allgather": "echo it takes two >&2; exit 1",
    "alltoall_perf": "echo never run",
}


def _on_two_nodes(folder: str, sent: int, watched: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows and what was left out of a suite on two ranks, while the link of each node counts `sent` bytes."""
    rows: list[dict[str, Any]] = []
    link = Path(folder) / "link"
    link.write_text("1000\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        patch.setenv("LINK", str(link))
        patch.setenv("SENT", str(sent))
        patch.delenv("SLURM_JOB_ID", raising=False)
        patch.setattr(LinkCounter, "sent_bytes", lambda self: sum(map(int, link.read_text().split())))
        counter = LinkCounter("eth0") if watched else None
        suite = VendorSuite(torch.device("cpu"), ("n1", "n2"), 30.0, rows.append, counter=counter)
        suite.run(["all_to_all", "all_gather"], 1024, 1 << 20)
    dist.barrier()
    return rows, suite.left_out


@pytest.mark.processes
@pytest.mark.parametrize(("sent", "watched"), [(6_000_000, True), (1_000_000, True), (0, False)])
def test_rows_are_held_against_the_links_of_all_nodes(tmp_path: Path, sent: int, watched: bool) -> None:
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (rows, left_out), (others, _) = run_ranks(2, _on_two_nodes, str(tmp_path), sent, watched)
    assert others == [] and [row["work"] for row in rows] == [2 * 1024, 2 * 262144]
    assert "it takes two" in left_out["osu_allgather"] and "devices" in left_out["alltoall_perf"]
    # Two ranks exchange half of their buffers, 20 times: 10.5 MB over both links.
    for row in rows:
        assert row["link_counter"] == ("eth0" if watched else None)
        assert row["correct"] is (sent != 1_000_000)
        if not row["correct"]:
            assert "eth0 sent 2,000,000 bytes where 10,526,720 had to cross" in row["refused"]
