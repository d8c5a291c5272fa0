"""The testbed's command, and whatever a testbed could leave behind on a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from piper_hpc.runtime import quota
from piper_hpc.testbed import segments, state

CHECKOUT = Path(__file__).parents[2]


def run_testbed(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m piper_hpc.testbed ...`, with its answer and its messages."""
    return subprocess.run(
        [sys.executable, "-m", "piper_hpc.testbed", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def traces() -> dict[str, Any]:
    """Whatever a testbed could leave behind on this machine, or change."""
    folder = state.folder()
    links = subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout
    routes = subprocess.run(["ip", "-j", "route"], capture_output=True, text=True, check=True).stdout
    return {
        "links": sorted(link["ifname"] for link in json.loads(links)),
        "routes": json.loads(routes),
        "namespaces": sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else [],
        "hosts": Path("/etc/hosts").read_text(),
        "cgroups": [
            str(home.root / quota.PARENT / "testbed")
            for home in quota.controllers().values()
            if (home.root / quota.PARENT / "testbed").exists()
        ],
        "segments": [segment.name for segment in segments.unused()],
        "folder": folder.exists(),
        "processes": _processes_of(folder),
        "configuration": {
            str(path): path.stat().st_mtime_ns
            for place in ("/etc/slurm", "/etc/munge", "/var/lib/mysql", "/var/log/munge")
            for path in Path(place).rglob("*")
        },
    }


def _processes_of(folder: Path) -> list[str]:
    """Command lines of processes whose command or environment names the testbed's folder as a daemon's would."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            command = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except (OSError, ValueError):
            continue
        daemon = command.split("/")[-1].startswith(("slurm", "munged", "mariadbd")) or "slurmstepd" in command
        if (daemon and str(folder) in command + environment.decode(errors="replace")) or (
            f"PIPER_TESTBED_DAEMON={folder}".encode() in environment
        ):
            found.append(command)
    return sorted(found)
