"""A CPU quota and a memory limit for a rank, through the kernel's control groups (v1 and v2).

Processes that share cores slow each other down, and lend each other their idle time: a pipeline stage that waits makes
the next one faster, which no cluster does. A rank under a quota behaves as a device of its own instead: the same speed
whether it runs alone or with all others, as long as the quotas' sum stays under the cores.

Every group lies below one parent, `piper_hpc/`, in each hierarchy it needs. A group that a process enters holds all
its threads and every child that it starts from then on.

Slurm's prolog on the testbed comes here with an interpreter alone (`python -S`): nothing beyond the standard library.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PARENT = "piper_hpc"
MIN_QUOTA_US = 1_000  # the kernel's own lower bound
MAX_PERIOD_US = 1_000_000
MOUNTS = Path("/proc/self/mounts")
OWN_GROUPS = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Controller:
    """Where one controller ("cpu", "memory") is mounted, and by which version of the interface."""

    root: Path
    version: int


@dataclass(frozen=True)
class Quota:
    """One control group: a folder in each hierarchy that its limits need."""

    name: str
    folders: tuple[Path, ...]

    def enter(self, pid: int | None = None) -> None:
        """Move a process (default: this one) with all its threads into the group; its later children follow it."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid or os.getpid()))

    def remove(self, timeout_s: float = 2.0) -> None:
        """Remove the group; no error if it is gone. Processes that just ended may keep it for a moment.

        Raises OSError (EBUSY) if a process is still inside after `timeout_s`.
        """
        for folder in self.folders:
            _remove_folder(folder, time.monotonic() + timeout_s)
            _prune(folder.parent)


def fits_one_core_each(ranks: int, cpu_share: float) -> bool:
    """Whether ranks of `cpu_share` cores each fit where each keeps to one core: three of 0.6 on two cores do not."""
    return -(-ranks // len(os.sched_getaffinity(0))) * cpu_share <= 1.0


def pin_to_core(turn: int, pid: int | None = None) -> int:
    """Keep a process (default: this one), its threads and its later children on one core; returns which.

    `turn` counts ranks: neighbours get different cores. The kernel hands quota out by core, in slices of 5 ms that are
    larger than a rank's quota of a period. Where a rank's main thread computes takes all of it, and a thread of its on
    another core, as gloo has one, would wait for the next period with each message.
    """
    pid = pid or os.getpid()
    cores = sorted(os.sched_getaffinity(pid))
    core = cores[turn % len(cores)]
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), {core})
    return core


def controllers() -> dict[str, Controller]:
    """The mounted "cpu" and "memory" controllers, by name; a v1 mount wins, since a controller has one home only."""
    found: dict[str, Controller] = {}
    for line in MOUNTS.read_text().splitlines():
        _, mount_point, kind, mount_options = line.split()[:4]
        root = Path(mount_point)
        if kind == "cgroup":
            names, version = mount_options.split(","), 1
        elif kind == "cgroup2":
            try:
                names, version = (root / "cgroup.controllers").read_text().split(), 2
            except OSError:
                continue
        else:
            continue
        for name in ("cpu", "memory"):
            if name in names and (name not in found or version == 1):
                found[name] = Controller(root, version)
    return found


def writable() -> bool:
    """Whether this process can create a CPU group with a quota (it tries, and leaves nothing behind)."""
    try:
        create(f"probe-{os.getpid()}", cpu_share=0.5, period_us=10_000).remove()
    except OSError:
        return False
    return True


def create(name: str, cpu_share: float, memory_bytes: int | None = None, *, period_us: int) -> Quota:
    """Make the group `piper_hpc/<name>` with `cpu_share` of one core and, if given, a limit of `memory_bytes`.

    A short period keeps the waits of a rank that used up its quota short; 10 ms leaves a 256^3 GEMM undisturbed.
    An existing group of the same name gets the new limits. Raises ValueError for limits that the kernel would not
    take, OSError where the control groups are not mounted or not writable (see `writable`).
    """
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"name={name!r}: must be a relative path without '..', for example 'run/rank0'")
    if not MIN_QUOTA_US <= period_us <= MAX_PERIOD_US:
        raise ValueError(f"period_us={period_us}: must lie in {MIN_QUOTA_US}..{MAX_PERIOD_US}, for example 10000")
    quota_us = round(cpu_share * period_us)
    if quota_us < MIN_QUOTA_US:
        raise ValueError(
            f"cpu_share={cpu_share}: share x period must be at least {MIN_QUOTA_US} us, "
            f"for example {MIN_QUOTA_US / period_us:g} with period_us={period_us}"
        )
    mounted = controllers()
    wanted = ("cpu",) if memory_bytes is None else ("cpu", "memory")
    folders: list[Path] = []
    for controller in wanted:
        if controller not in mounted:
            raise OSError(errno.ENODEV, f"the {controller} control group is not mounted")
        home = mounted[controller]
        folder = _make_folder(home, controller, path)
        if folder not in folders:
            folders.append(folder)
        if controller == "cpu" and home.version == 1:
            (folder / "cpu.cfs_period_us").write_text(str(period_us))
            (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        elif controller == "cpu":
            (folder / "cpu.max").write_text(f"{quota_us} {period_us}")
        elif home.version == 1:
            (folder / "memory.limit_in_bytes").write_text(str(memory_bytes))
        else:
            (folder / "memory.max").write_text(str(memory_bytes))
    return Quota(name, tuple(folders))


@dataclass(frozen=True)
class StandStill:
    """For how long the group of this process has stood still because its quota was used up.

    statistics: the group's `cpu.stat`; None where there is none, so that nothing ever stands still.
    """

    statistics: Path | None

    @classmethod
    def of_this_process(cls) -> StandStill:
        """Of the group that it is in now."""
        home = controllers().get("cpu")
        for line in OWN_GROUPS.read_text().splitlines() if home else ():
            _, names, path = line.split(":", 2)
            if home is not None and ("cpu" in names.split(",") if home.version == 1 else not names):
                statistics = home.root / path.lstrip("/") / "cpu.stat"
                return cls(statistics if statistics.exists() else None)
        return cls(None)

    def seconds(self) -> float:
        """Since the group was made."""
        if self.statistics is None:
            return 0.0
        known = dict(line.split() for line in self.statistics.read_text().splitlines())
        # Nanoseconds in v1, microseconds in v2; a group without a quota may lack both.
        return int(known.get("throttled_time", 0)) * 1e-9 + int(known.get("throttled_usec", 0)) * 1e-6


def processes(prefix: str) -> list[int]:
    """The processes in the group `piper_hpc/<prefix>` and in all groups below it."""
    pids: set[int] = set()
    for folder in _folders(prefix):
        try:
            pids.update(int(pid) for pid in (folder / "cgroup.procs").read_text().split())
        except FileNotFoundError:  # removed in between
            continue
    return sorted(pids)


def remove_tree(prefix: str, timeout_s: float = 2.0) -> None:
    """Remove `piper_hpc/<prefix>` and all groups below it, and `piper_hpc` itself if nothing is left in it.

    Raises OSError (EBUSY) if a process is still inside after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    for folder in _folders(prefix):  # children come before their parents
        _remove_folder(folder, deadline)
        _prune(folder.parent)


def _folders(prefix: str) -> Iterator[Path]:
    for root in {controller.root for controller in controllers().values()}:
        for parent, _, _ in os.walk(root / PARENT / prefix, topdown=False):
            yield Path(parent)


def _make_folder(home: Controller, controller: str, path: PurePosixPath) -> Path:
    folder = home.root / PARENT / path
    for _ in range(10):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for part in reversed([folder, *folder.relative_to(home.root).parents]):  # from the root down
                group = home.root / part
                if home.version == 2 and group != folder:
                    _enable_controller(group, controller)
                if controller == "cpu" and group != home.root:
                    _maximise_cpu_weight(group, home.version)
            return folder
        except FileNotFoundError:  # another process pruned the empty parent in between
            continue
    raise OSError(errno.EBUSY, f"another process keeps removing the control group {folder}")


def _maximise_cpu_weight(group: Path, version: int) -> None:
    """Give the group the largest CPU weight: by default it weighs as one process, and would starve beside a few.

    What the quotas leave of the cores is for everybody else, whatever the weight.
    """
    name, weight = ("cpu.shares", "262144") if version == 1 else ("cpu.weight", "10000")
    (group / name).write_text(weight)


def _enable_controller(parent: Path, controller: str) -> None:
    """Enable the controller for the children of a v2 group (cgroup.subtree_control): v2 does it level by level."""
    switch = parent / "cgroup.subtree_control"
    if controller not in switch.read_text().split():
        switch.write_text(f"+{controller}")


def _remove_folder(folder: Path, deadline: float) -> None:
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def _prune(folder: Path) -> None:
    """Remove the empty folders from here up to and including the common parent."""
    while PARENT in folder.parts:
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:  # in use, or another run's
            return
        folder = folder.parent
