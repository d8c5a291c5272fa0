"""Counters of a node from files as kernels have them, and what is not there or may not be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from piper_hpc.runtime import network
from piper_hpc.spec.fabric import Traffic

DEV = """Inter-|   Receive                         |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo: 9000 10 0 0 0 0 0 0 9000 10 0 0 0 0 0 0
  hsn0:  700 10 0 0 0 0 0 0  500 10 0 0 0 0 0 0
 bond0:   70 10 0 0 0 0 0 0   50 10 0 0 0 0 0 0
"""


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys and /proc of a node whose interfaces are hsn0 and bond0; nothing of /sys is there yet."""
    (tmp_path / "proc/net").mkdir(parents=True)
    (tmp_path / "proc/net/dev").write_text(DEV)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    return tmp_path / "sys"


def put(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_without_sys_the_interfaces_of_the_namespace_count_but_loopback(node: Path) -> None:
    assert network.counters(node) == [Traffic("hsn0", "socket", 500, 700), Traffic("bond0", "socket", 50, 70)]


def test_bonds_count_nothing_again_beside_physical_interfaces(node: Path) -> None:
    put(node / "class/net/hsn0/device")
    put(node / "class/net/bond0")
    assert network.counters(node) == [Traffic("hsn0", "socket", 500, 700)]


def test_cards_count_in_their_own_units(node: Path) -> None:
    counted = {"hni_sts_tx_ok_octets": "1200@1674414354.329651605\n", "hni_sts_rx_ok_octets": "1300@1674414354.3\n"}
    put(node / "class/cxi/cxi0/device/telemetry", **counted)
    put(node / "class/infiniband/mlx5_0/ports/1/counters", port_xmit_data="100\n", port_rcv_data="200\n")
    put(node / "class/infiniband/mlx5_0/ports/2/counters", port_xmit_data="1\n", port_rcv_data="2\n")
    assert network.counters(node)[2:] == [
        Traffic("mlx5_0", "ib", 400, 800),
        Traffic("mlx5_0:2", "ib", 4, 8),
        Traffic("cxi0", "cxi", 1200, 1300),
    ]


def test_what_is_torn_or_missing_is_left_out(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(node / "class/cxi/cxi0/device/telemetry", hni_sts_tx_ok_octets="12@1.2")
    put(node / "class/infiniband/mlx5_0/ports/1/counters", port_xmit_data="N/A (no PMA)\n", port_rcv_data="2\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(node / "nowhere"))
    assert network.counters(node) == []


def test_this_machines_counters_only_grow() -> None:
    before, after = network.counters(), network.counters()
    assert [each.interface for each in before] == [each.interface for each in after]
    assert all(now.sent_bytes >= then.sent_bytes for then, now in zip(before, after, strict=True))


def test_the_library_is_asked_unless_the_user_has_said_how_much_it_prints() -> None:
    silent, own = {"NCCL_DEBUG_SUBSYS": "ALL"}, {"NCCL_DEBUG": "WARN"}
    network.ask_library(silent)
    network.ask_library(own)
    assert silent == {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "ALL"} and own == {"NCCL_DEBUG": "WARN"}


KEPT_BACK = """
import ctypes, sys
from pathlib import Path
from piper_hpc.runtime import network
ctypes.CDLL(None).printf(b"NCCL INFO Using network Socket\\n")
log = Path(sys.argv[1])
print(log.stat().st_size, network.said_in(log), file=sys.stderr)
"""


def test_what_c_code_keeps_back_is_in_the_log_when_it_is_read(tmp_path: Path) -> None:
    """NCCL prints to C's stdout, which keeps lines back once it is a file, as a rank's is."""
    log = tmp_path / "rank-0.log"
    with log.open("wb") as out:
        command = [sys.executable, "-c", KEPT_BACK, str(log)]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(command, env=buffered, stdout=out, stderr=subprocess.PIPE, text=True, check=True)
    assert ended.stderr.strip() == "0 NET/Socket"
    assert network.said_in(tmp_path / "none") is None
