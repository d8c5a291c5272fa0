"""The parts that need no root: the block in the hosts file, pid files, the record, and a timed transfer."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from piper_hpc.testbed import hosts, process, state, task, transfer
from piper_hpc.testbed.state import Link, Node, Testbed


def test_the_hosts_block_comes_and_goes_and_leaves_the_rest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hosts"
    text = "127.0.0.1 localhost\n\n# a comment\n192.0.2.1 gateway gw\n"
    file.write_text(text)
    file.chmod(0o640)
    monkeypatch.setattr(hosts, "HOSTS", file)
    assert hosts.owner() is None
    hosts.add(Path("/run/a"), {"n1": "10.0.0.1", "n2": "10.0.0.2"})
    hosts.add(Path("/run/b"), {"n1": "10.0.0.3"})  # after a crash: replaces, never doubles
    assert file.read_text().startswith(text)
    assert file.read_text().count("n1") == 1 and "10.0.0.3 n1" in file.read_text()
    assert hosts.owner() == Path("/run/b")
    assert hosts.first_conflict({"n1": "", "gw": ""}) == "gw"
    assert hosts.first_conflict({"n1": ""}) is None  # our own
    hosts.remove()
    hosts.remove()
    assert file.read_text() == text and file.stat().st_mode & 0o777 == 0o640


def test_a_hosts_file_that_is_a_mount_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "a container mounts this file")

    file = tmp_path / "hosts"
    file.write_text("127.0.0.1 localhost\n")
    monkeypatch.setattr(hosts, "HOSTS", file)
    monkeypatch.setattr(hosts.os, "replace", busy)
    hosts.add(Path("/run/a"), {"n1": "10.0.0.1"})
    assert "10.0.0.1 n1" in file.read_text()
    hosts.remove()
    assert file.read_text() == "127.0.0.1 localhost\n" and os.listdir(tmp_path) == ["hosts"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIPER_TESTBED_DIR", str(tmp_path))
    for part in ("pids", "logs"):
        (tmp_path / part).mkdir()
    return tmp_path


SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]


@pytest.mark.processes
def test_a_pid_file_names_one_process_and_no_later_one_of_the_same_number(folder: Path) -> None:
    process.spawn(folder, "daemon", SLEEP)
    pid = process.pid_of(folder, "daemon")
    assert pid is not None
    # The kernel shows a new process's environment a moment after it started.
    assert process.wait_until(lambda: process.marked(folder) == [pid], 5)
    note = folder / "pids" / "daemon"
    right = note.read_text()
    note.write_text(json.dumps({**json.loads(right), "start_ticks": 1}))  # as if the number had been given again
    assert process.pid_of(folder, "daemon") is None
    process.stop_all(folder)
    assert process.start_ticks(pid) is not None  # not ours by this note: left alone
    note.write_text(right)
    process.stop_all(folder)
    assert process.start_ticks(pid) is None and process.pid_of(folder, "daemon") is None


@pytest.mark.processes
def test_a_daemon_that_ignores_the_request_is_killed_and_one_without_a_note_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE_S", 0.3)
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    process.spawn(folder, "stubborn", [sys.executable, "-S", "-c", stubborn])
    assert process.wait_until(lambda: process.log_tail(folder, "stubborn") == "on", 10)
    process.stop_all(folder)
    assert process.pid_of(folder, "stubborn") is None
    process.spawn(folder, "lost", SLEEP)
    (folder / "pids" / "lost").unlink()
    assert process.wait_until(lambda: len(process.marked(folder)) == 1, 5)
    assert process.kill_all(lambda: process.marked(folder)) == []
    assert process.marked(folder) == []


def test_the_record_reads_back_and_counts_only_while_its_controller_runs(folder: Path) -> None:
    written = Testbed(
        schema_version=1,
        created="2026-01-01T00:00:00+00:00",
        slurm_conf="/x/slurm.conf",
        environment={"SLURM_CONF": "/x/slurm.conf"},
        nodes=(Node("n1", "10.0.0.1", "rack1"),),
        ranks_per_node=2,
        cpu_share=0.2,
        period_us=10_000,
        memory_bytes=2**30,
        links={"nic": Link(50e6, 49.5e6)},
        options={"nodes": 1},
    )
    assert state.read() is None
    state.write(written)
    assert state.read() == written
    assert state.load() is None
    process.spawn(folder, "slurmctld", SLEEP)
    assert state.load() == written
    process.stop_all(folder)
    assert state.load() is None
    (folder / "testbed.json").write_text('{"schema_version": 99}')
    assert state.read() is None


def test_reading_the_record_needs_no_torch() -> None:
    code = "import sys; import piper_hpc.testbed.state, piper_hpc.testbed.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_transfer_measures_what_the_sender_offers() -> None:
    port, offered = 28_000 + os.getpid() % 4000, 4e6
    stop = threading.Event()

    def slow_sender() -> None:
        connection = connect(port)
        with connection:
            while not stop.is_set():
                connection.sendall(bytes(40_000))
                time.sleep(0.01)

    sender = threading.Thread(target=slow_sender)
    sender.start()
    rate = transfer.receive("127.0.0.1", port, 0.5)
    stop.set()
    sender.join()
    assert 0.3 * offered < rate <= 1.2 * offered


def connect(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port))
        except OSError:
            time.sleep(0.02)
    raise TimeoutError


def test_ranks_that_are_neighbours_take_different_turns_at_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    def core_index(node: str, local: int) -> int:
        monkeypatch.setenv("SLURMD_NODENAME", node)
        monkeypatch.setenv("SLURM_LOCALID", str(local))
        return task.core_index()

    for ranks_per_node in (1, 2):
        turns = [core_index(f"n{node}", local) % 2 for node in range(1, 5) for local in range(ranks_per_node)]
        assert sum(turns) == len(turns) / 2, "half of all ranks on each of two cores"
