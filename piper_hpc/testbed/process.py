"""Start and stop daemons by pid files, after checking that a process belongs to this testbed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from piper_hpc.testbed import network

MARK = "PIPER_TESTBED_DAEMON"  # in the environment of every daemon, with the testbed's folder as value
GRACE_S = 3.0
KILLED_S = 5.0
"""How long a busy machine may take to end what was killed."""


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with the pid it names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = stat.rpartition(")")[2].split()  # the command's name before may hold anything
    return None if state == "Z" else int(rest[18])


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process started with; empty where it may not be read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {key: value for key, _, value in pairs}


def all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Of what a testbed starts: nothing of the caller's shell, and a mark by which it is found without a pid file."""
    return {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8", MARK: str(folder), **more}


def spawn(folder: Path, name: str, command: list[str], namespace: str | None = None, **variables: str) -> None:
    """Start a daemon in the foreground form of its command, log to `logs/<name>.log`, note it in `pids/<name>`.

    namespace: the network namespace to start it in; variables: of its environment.
    """
    if namespace:
        command = network.command_in(namespace, *command)
    with (folder / "logs" / f"{name}.log").open("ab") as log:
        daemon = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment(folder, **variables),
            start_new_session=True,
        )
    note = {"pid": daemon.pid, "start_ticks": start_ticks(daemon.pid), "boot_id": boot_id()}
    (folder / "pids" / name).write_text(json.dumps(note))


def names(folder: Path) -> list[str]:
    """The daemons that were started."""
    return sorted(path.name for path in (folder / "pids").glob("*"))


def pid_of(folder: Path, name: str) -> int | None:
    """The pid of a daemon that runs; None if it ended, or if its number now belongs to another process."""
    try:
        note = json.loads((folder / "pids" / name).read_text())
    except (OSError, ValueError):
        return None
    ours = note["boot_id"] == boot_id() and note["start_ticks"] == start_ticks(note["pid"])
    return note["pid"] if ours and note["start_ticks"] is not None else None


def log_tail(folder: Path, name: str, lines: int = 8) -> str:
    """The end of a daemon's log, for a message."""
    with contextlib.suppress(OSError):
        text = (folder / "logs" / f"{name}.log").read_text(errors="replace")
        return " | ".join(text.splitlines()[-lines:])
    return ""


def wait_until(condition: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def stop_all(folder: Path) -> None:
    """End every daemon of the pid files: TERM to all, KILL to those still there after a while."""
    for number, timeout_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, KILLED_S)):
        running = [pid for name in names(folder) if (pid := pid_of(folder, name))]
        _signal(running, number)
        wait_until(lambda: not any(pid_of(folder, name) for name in names(folder)), timeout_s, 0.02)


def kill_all(find: Callable[[], Iterable[int]], timeout_s: float = 5.0) -> list[int]:
    """KILL what `find` returns until it returns nothing; the processes that are still there after `timeout_s`."""

    def gone() -> bool:
        found = [pid for pid in find() if pid != os.getpid()]
        _signal(found, signal.SIGKILL)
        return not found

    return [] if wait_until(gone, timeout_s, 0.02) else sorted(find())


def marked(folder: Path) -> list[int]:
    """Processes that descend from a daemon of this testbed and kept its mark, noted in a pid file or not."""
    return [pid for pid in all_pids() if environment_of(pid).get(MARK) == str(folder) and start_ticks(pid) is not None]


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
