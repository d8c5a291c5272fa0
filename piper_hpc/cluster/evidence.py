"""What measurements hold for, and what is true now: the two sides of the staleness of a calibration."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from piper_hpc.cluster.machine import Machine, processor
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runtime import mpi
from piper_hpc.spec import BENCHMARK_VERSION

DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
MEASURING = ("microbench", "comm")
"""Folders of this package whose code is what a measurement times."""


def facts(machine: Machine, cluster: ClusterConfig, dtype: str, nodes: Sequence[str] = ()) -> dict[str, str]:
    """Of this cluster as it is configured, this software, and the nodes of a job where they are known.

    A login node may lack the devices' driver, and a job's nodes, processor, device, NCCL and MPI are known to the job
    alone, once it has started them: what is not known is not named, and not compared. Nothing is imported or started to
    ask.

    Two facts speak for the code. `benchmark_version` is raised where rows mean another thing: they are measured again.
    `benchmark_code` is a digest of the files that measure and of the exchanges that are measured, so that whoever edits
    these is warned, in a checkout as in an installed package; a git commit would warn of each change to the README, and
    keep silent of what is not committed.
    """
    return {
        **({"processor": processor()} if nodes else {}),
        **machine.fingerprint,
        "cluster": cluster.name,
        "size": f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks",
        "dtype": dtype,
        "benchmark_version": str(BENCHMARK_VERSION),
        "benchmark_code": _digest(),
        **_installed("piper-hpc"),
        **_driver(),
        **_of_torch(),
        **({"mpi": mpi.library()} if "mpi4py.MPI" in sys.modules else {}),
        **({"nodes": ", ".join(sorted(nodes))} if nodes else {}),
    }


@cache
def _digest() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for folder in MEASURING for file in (package / folder).rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _of_torch() -> dict[str, str]:
    """Of a process that uses torch already: its NCCL (on ROCm its RCCL), and the name of the device that it started."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    found = {}
    if torch.version.cuda or torch.version.hip:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for module in (torch.cuda, torch.xpu):
        if module.is_initialized():
            found["device_name"] = str(module.get_device_name())
    return found


def _installed(package: str) -> dict[str, str]:
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}  # run from a checkout that is not installed


def _driver() -> dict[str, str]:
    for path in map(Path, DRIVERS):
        if path.is_file():
            return {"driver": path.read_text().splitlines()[0].strip()}
    return {}
