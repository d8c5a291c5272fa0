"""Outages of a testbed that is up, each with what mends it: a node's daemon, its link, the controller."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from piper_hpc.testbed import network, process, slurm, state
from piper_hpc.testbed.state import Testbed


def kill_node_daemon(testbed: Testbed, node: str) -> None:
    """SIGKILL for a node's slurmd; its ranks go on. What Slurm would find out after SlurmdTimeout it is told at once:
    the node is down, and its job is requeued."""
    _kill(f"slurmd-{node}")
    _scontrol(testbed, "update", f"NodeName={node}", "State=DOWN", "Reason=slurmd was killed")


def start_node_daemon(testbed: Testbed, node: str) -> None:
    """Bring the node back."""
    space = f"{network.PREFIX}{node}"
    process.spawn(state.folder(), f"slurmd-{node}", ["slurmd", "-D", "-N", node], space, SLURM_CONF=testbed.slurm_conf)
    process.wait_until(lambda: slurm.node_states(_conf(testbed)).get(node, "") != "unknown", 5)
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


def limit_memory(pid: int, most_bytes: int) -> None:
    """Set the limit of the process's memory group; one that needs more then is killed by the kernel."""
    from piper_hpc.runtime import quota

    home = quota.controllers()["memory"]
    for line in (state.Path("/proc") / str(pid) / "cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        if (home.version == 2 and number == "0") or (home.version == 1 and "memory" in names.split(",")):
            name = "memory.max" if home.version == 2 else "memory.limit_in_bytes"
            with contextlib.suppress(OSError):  # EBUSY: it cannot be brought down so far, and does not come up again
                (home.root / path.lstrip("/") / name).write_text(str(most_bytes))


def _conf(testbed: Testbed) -> state.Path:
    return state.Path(testbed.slurm_conf)


def _kill(daemon: str) -> None:
    pid = process.pid_of(state.folder(), daemon)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
        process.wait_until(lambda: process.pid_of(state.folder(), daemon) is None, 5)


def _link(node: str, to: str) -> None:
    """Of the cable's end outside the node: what is inside, its routes too, stays."""
    subprocess.run(["ip", "link", "set", f"{network.PREFIX}v{node.removeprefix('n')}", to], check=True)


def _scontrol(testbed: Testbed, *words: str) -> None:
    subprocess.run(["scontrol", *words], env=os.environ | testbed.environment, check=False, capture_output=True)
