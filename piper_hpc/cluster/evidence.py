"""What measurements hold for, and what is true now: the two sides of the staleness of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from piper_hpc.cluster.machine import Machine
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.spec import BENCHMARK_VERSION

DRIVERS = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")


def facts(machine: Machine, cluster: ClusterConfig, dtype: str, nodes: Sequence[str] = ()) -> dict[str, str]:
    """Of this cluster as it is configured, this software, and the nodes of a job where they are known.

    A login node may lack the devices' driver, and a job's nodes are known to the job alone: what is not known is not
    named, and not compared.
    """
    return machine.fingerprint | {
        "cluster": cluster.name,
        "size": f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks",
        "dtype": dtype,
        "benchmark_version": str(BENCHMARK_VERSION),
        **_installed("piper-hpc"),
        **_driver(),
        **({"nodes": ", ".join(sorted(nodes))} if nodes else {}),
    }


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
