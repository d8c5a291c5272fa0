"""What a rank of a test job runs: `describe` prints what it sees as one JSON line, `exchange` and `talk` send between
two nodes.

Runs under any Python, without the package.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

SECONDS = 1.5
PORT = 29555
MESSAGE_BYTES = 48  # as many as a header of gloo has


def limits() -> dict[str, int]:
    """This process's own quota and memory limit, from the kernel."""
    mounts = [line.split()[:4] for line in Path("/proc/self/mounts").read_text().splitlines()]
    found = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for _, root, kind, mount_options in mounts:
            group = Path(root + path)
            if kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in mount_options.split(","):
                found["quota_us"] = int((group / "cpu.cfs_quota_us").read_text())
                found["period_us"] = int((group / "cpu.cfs_period_us").read_text())
            if kind == "cgroup" and controllers == "memory" and "memory" in mount_options.split(","):
                found["memory_bytes"] = int((group / "memory.limit_in_bytes").read_text())
            if kind == "cgroup2" and not controllers and (group / "cpu.max").exists():
                found["quota_us"], found["period_us"] = map(int, (group / "cpu.max").read_text().split())
                found["memory_bytes"] = int((group / "memory.max").read_text())
    return found


def address() -> str:
    """The address that this node's packets carry."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((socket.gethostbyname("n1"), 9))
        return probe.getsockname()[0]


def cpu_share() -> float:
    """Cores that this process gets while it asks for one, together with a thread that asks for another."""
    end = time.monotonic() + SECONDS
    begin, cpu = time.monotonic(), time.process_time()

    def burn() -> None:
        while time.monotonic() < end:
            pass

    helper = threading.Thread(target=burn)
    helper.start()
    burn()
    helper.join()
    return (time.process_time() - cpu) / (time.monotonic() - begin)


def describe() -> None:
    facts = {
        "rank": int(os.environ["SLURM_PROCID"]),
        "node": os.environ["SLURMD_NODENAME"],
        "topology": os.environ["SLURM_TOPOLOGY_ADDR"],
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "address": address(),
        "limits": limits(),
        "cpu_share": cpu_share(),
    }
    print(json.dumps(facts), flush=True)


def connection() -> socket.socket:
    """Between rank 0 and rank 1, which is the one that waits."""
    receiver = os.environ["PAYLOAD_RECEIVER"]
    if os.environ["SLURM_PROCID"] == "1":
        with socket.create_server((receiver, PORT)) as server:
            return server.accept()[0]
    deadline = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection((receiver, PORT), timeout=20)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def exchange(size_bytes: int) -> None:
    """Rank 0 sends to rank 1, which prints what arrived, in bytes per second."""
    with connection() as other:
        if os.environ["SLURM_PROCID"] == "0":
            other.sendall(bytes(size_bytes))
            return
        received, begin = 0, time.perf_counter()
        buffer = bytearray(2**18)
        while count := other.recv_into(buffer):
            received += count
        print(json.dumps({"bytes": received, "bytes_per_s": received / (time.perf_counter() - begin)}), flush=True)


def talk(count: int) -> None:
    """Both ranks send `count` short messages, each an answer to the other's."""
    with connection() as other:
        other.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(count):
            other.sendall(bytes(MESSAGE_BYTES))
            assert len(other.recv(MESSAGE_BYTES, socket.MSG_WAITALL)) == MESSAGE_BYTES


if __name__ == "__main__":
    if sys.argv[1] == "describe":
        describe()
    else:
        {"exchange": exchange, "talk": talk}[sys.argv[1]](int(sys.argv[2]))
