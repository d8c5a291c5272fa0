"""Provenance of a cluster now (nodes, driver, libraries, versions): what the staleness of a calibration compares."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from piper_hpc.cluster.machine import Machine, processor
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runtime import mpi
from piper_hpc.spec import BENCHMARK_VERSION

DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def facts(machine: Machine, cluster: ClusterConfig, dtype: str, nodes: Sequence[str] = ()) -> dict[str, str]:
    """Of this cluster as it is configured, this software, and the nodes of a job where they are known.

    A login node may lack the devices' driver, and a job's nodes, processor, device, NCCL and MPI are known to the job
    alone, once it has started them: what is not known is not named, and not compared. Nothing is imported or started to
    ask.

    `benchmark_version` speaks for the code: it is raised where rows mean another thing, and a test fails where code
    that measures or is measured changes without (tests/microbench/test_measured_code.py). Neither a git commit nor a
    digest of files is compared: both would warn of a moved file, and of each change to a comment.
    """
    return {
        **({"processor": processor()} if nodes else {}),
        **machine.fingerprint,
        "cluster": cluster.name,
        "size": f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks",
        "dtype": dtype,
        "benchmark_version": str(BENCHMARK_VERSION),
        **_installed("piper-hpc"),
        **_driver(),
        **_of_torch(),
        **({"mpi": mpi.library()} if "mpi4py.MPI" in sys.modules else {}),
        **({"nodes": ", ".join(sorted(nodes))} if nodes else {}),
    }


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
