"""How many processes the kernel has killed for lack of memory: on this node, and in this process's control groups."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

from piper_hpc.runtime import quota

VMSTAT = Path("/proc/vmstat")
WORDS = "processes were killed for lack of memory"
CGROUP = Path("/proc/self/cgroup")


def counted() -> dict[str, int]:
    """Kills so far, by the file that counts them; those that cannot be read are left out."""
    found = {}
    for path in (VMSTAT, *_of_groups()):
        try:
            match = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
        except OSError:
            continue
        if match:
            found[str(path)] = int(match[1])
    return found


def since(before: Mapping[str, int], node: str = "") -> tuple[str, ...]:
    """What was counted since `before`, in words; empty where nothing was."""
    new = {path: count - before[path] for path, count in counted().items() if count > before.get(path, count)}
    where = node or platform.node()
    return tuple(f"{count} {WORDS} on {where} meanwhile (oom_kill in {path})" for path, count in new.items())


def _of_groups() -> list[Path]:
    """Counters of this process's memory group and the one above it."""
    home = quota.controllers().get("memory")
    if home is None:
        return []
    for line in CGROUP.read_text().splitlines():
        number, names, path = line.split(":", 2)
        if (home.version == 2 and number == "0") or (home.version == 1 and "memory" in names.split(",")):
            group = home.root / path.lstrip("/")
            name = "memory.events" if home.version == 2 else "memory.oom_control"
            return [folder / name for folder in (group, group.parent) if folder.is_relative_to(home.root)]
    return []
