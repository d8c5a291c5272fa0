"""Outages of a testbed that is up, each with what mends it: a node's daemon, its link, the controller."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from piper_hpc.runtime import quota
from piper_hpc.testbed import network, process, slurm, state
from piper_hpc.testbed.state import Testbed

USED_AND_LIMIT = {1: ("memory.usage_in_bytes", "memory.limit_in_bytes"), 2: ("memory.current", "memory.max")}
"""Files of a memory group, by the version of control groups."""
HOG = """
import os, sys, time
open("/proc/self/oom_score_adj", "w").write("-1000")
open(sys.argv[1], "w").write(str(os.getpid()))
held = b"x" * int(sys.argv[2])
"""


def kill_node_daemon(testbed: Testbed, node: str) -> None:
    """SIGKILL for a node's slurmd; its ranks go on. What Slurm would find out after SlurmdTimeout it is told at once:
    the node is down, and its job is requeued."""
    _kill(f"slurmd-{node}")
    _scontrol(testbed, "update", f"NodeName={node}", "State=DOWN", "Reason=slurmd was killed")


def start_node_daemon(testbed: Testbed, node: str) -> None:
    """Bring the node back once its slurmd has reported: a job that starts there before loses it again."""
    space, before = f"{network.PREFIX}{node}", _daemon_started(testbed, node)
    process.spawn(state.folder(), f"slurmd-{node}", ["slurmd", "-D", "-N", node], space, SLURM_CONF=testbed.slurm_conf)
    process.wait_until(lambda: _daemon_started(testbed, node) != before, slurm.START_S)
    _scontrol(testbed, "update", f"NodeName={node}", "State=RESUME")


def cut_link(node: str) -> None:
    """From now on no packet reaches the node or leaves it; nobody is told."""
    _link(node, "down")


def mend_link(node: str) -> None:
    """Put the cable back."""
    _link(node, "up")


def kill_controller() -> None:
    """SIGKILL for slurmctld: jobs go on, and nobody answers."""
    _kill("slurmctld")


def start_controller(testbed: Testbed) -> None:
    """Start slurmctld again, with the state that it saved."""
    process.spawn(state.folder(), "slurmctld", ["slurmctld", "-D"], SLURM_CONF=testbed.slurm_conf)
    process.wait_until(lambda: bool(slurm.node_states(_conf(testbed))), slurm.START_S)


def limit_memory(pid: int, room_bytes: int = 16 << 20) -> None:
    """Set the limit of the process's memory group to what it uses and a little, and use that up: the kernel has to kill
    the process, as what uses it up is exempt."""
    home = quota.controllers()["memory"]
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        if (home.version == 2 and number == "0") or (home.version == 1 and "memory" in names.split(",")):
            group = home.root / path.lstrip("/")
            used, limit = USED_AND_LIMIT[home.version]
            (group / limit).write_text(str(int((group / used).read_text()) + room_bytes))
            words = [sys.executable, "-S", "-c", HOG, str(group / "cgroup.procs"), str(4 * room_bytes)]
            subprocess.run(words, check=False, timeout=30)


def _conf(testbed: Testbed) -> Path:
    return Path(testbed.slurm_conf)


def _kill(daemon: str) -> None:
    pid = process.pid_of(state.folder(), daemon)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        process.wait_until(lambda: process.pid_of(state.folder(), daemon) is None, 5)


def _link(node: str, to: str) -> None:
    """Of the cable's end outside the node: what is inside, its routes too, stays."""
    subprocess.run(["ip", "link", "set", f"{network.PREFIX}v{node.removeprefix('n')}", to], check=True)


def _daemon_started(testbed: Testbed, node: str) -> str:
    """When the slurmd that last reported for the node began, as slurmctld says it."""
    found = re.search(r"SlurmdStartTime=(\S+)", _scontrol(testbed, "show", "node", node))
    return found[1] if found else ""


def _scontrol(testbed: Testbed, *words: str) -> str:
    environment = os.environ | testbed.environment
    return subprocess.run(["scontrol", *words], env=environment, check=False, capture_output=True, text=True).stdout
