"""What a machine that runs ranks must have: Python, torch and its back ends, devices, names, interfaces, files."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from piper_hpc.config.schema import ClusterConfig
from piper_hpc.doctor.finding import Finding, failed, ok, warning

NEEDED_GIB = 1.0
PROBE = ".piper_doctor"
TEMPORARY = ("tmpfs", "ramfs")
"""File systems that a node has for itself."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")


def examine(cluster: ClusterConfig, runs: Path) -> list[Finding]:
    """Everything that this host can tell. runs: the folder of all runs, which may not be there yet."""
    return [*python(), *torch_build(cluster), *packages(), *names(cluster), *interfaces(cluster), *files(cluster, runs)]


def python() -> Iterator[Finding]:
    """The interpreter that ranks would run: this one."""
    yield ok("Python", f"{sys.version.split()[0]} at {sys.executable}")


def torch_build(cluster: ClusterConfig) -> Iterator[Finding]:
    """torch, the back end of the cluster's devices, and the devices themselves."""
    if importlib.util.find_spec("torch") is None:
        yield failed("torch", "not installed", "install the build for the site's devices: make run TORCH=...")
        return
    import torch
    import torch.distributed as dist

    build = f"cuda {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"rocm {torch.version.hip}" if torch.version.hip else "cpu")
    backends = [name for name in ("gloo", "nccl", "xccl", "mpi") if getattr(dist, f"is_{name}_available")()]
    wanted = {"cuda": "nccl", "xpu": "xccl"}.get(cluster.device, "gloo")
    found = f"{torch.__version__} for {build}, back ends {', '.join(backends)}"
    if wanted in backends:
        yield ok("torch", found)
    else:
        mend = f"cluster.device={cluster.device} needs a torch with {wanted}: make run TORCH=..., or the site's module"
        yield failed("torch", found, mend)
    if cluster.device in ("cuda", "xpu"):
        yield from _devices(cluster, torch.get_device_module(cluster.device))


def _devices(cluster: ClusterConfig, module: object) -> Iterator[Finding]:
    count = int(module.device_count())  # type: ignore[attr-defined]
    if count < cluster.ranks_per_node and not cluster.gpus_per_task:
        yield failed(
            "devices",
            f"{count} visible, cluster.ranks_per_node={cluster.ranks_per_node}",
            "look on a compute node (on=nodes); cluster.gpus_per_node or cluster.gres must ask for them",
        )
        return
    yield ok("devices", f"{count} visible")
    reaches = getattr(module, "can_device_access_peer", None)
    if reaches is not None and count > 1:
        apart = [f"{a}-{b}" for a in range(count) for b in range(a + 1, count) if not reaches(a, b)]
        if apart:
            mend = "messages between them go through the host; masks of one device a task do that: gpus_per_node"
            yield warning("peer access", f"devices {', '.join(apart)} do not reach one another", mend)
        else:
            yield ok("peer access", "every device reaches every other")


def packages() -> Iterator[Finding]:
    """What only some commands need."""
    for name, needed_for, extra in (
        ("wandb", "tracking=wandb", "wandb"),
        ("plotly", "reports of runs", "report"),
        ("mpi4py", "task.backend=mpi", "mpi"),
    ):
        if importlib.util.find_spec(name) is None:
            yield warning(name, f"not installed: no {needed_for}", f"pip install 'piper-hpc[{extra}]'")
        elif name == "mpi4py" and (reason := _mpi_problem()):
            yield warning(name, f"has no MPI library: {reason}", "load the site's MPI module before Python")
        else:
            yield ok(name, "installed")


def _mpi_problem() -> str | None:
    """In a process of its own: MPI can be started only once, and aborts."""
    command = [sys.executable, "-c", "from piper_hpc.runtime import mpi; mpi.load()"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return (answer.stderr.strip().splitlines() or ["no reason given"])[-1] if answer.returncode else None


def names(cluster: ClusterConfig) -> Iterator[Finding]:
    """Whether this host's own name leads to an address, as the rendezvous of several nodes needs."""
    name = socket.gethostname()
    try:
        addresses = sorted({info[4][0] for info in socket.getaddrinfo(name, None)})
    except OSError as error:
        mend = "ranks on other nodes cannot find this one: an entry in /etc/hosts, or MASTER_ADDR in the batch script"
        yield failed("host name", f"{name}: {error}", mend)
        return
    loopback = all(str(address).startswith(("127.", "::1")) for address in addresses)
    found = f"{name} is {', '.join(map(str, addresses))}"
    if loopback and cluster.scheduler == "slurm":
        yield warning("host name", found, "other nodes cannot reach it so: set MASTER_ADDR in the batch script")
    else:
        yield ok("host name", found)


def interfaces(cluster: ClusterConfig) -> Iterator[Finding]:
    """Whether the interfaces that the configuration or the shell name are there."""
    known = psutil.net_if_addrs()
    for variable in INTERFACES:
        named = cluster.environment.get(variable) or os.environ.get(variable)
        if named is None:
            continue
        prefixes = [word.lstrip("^=") for word in named.split(",")]
        missing = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in known)]
        if missing:
            listed = ", ".join(sorted(known))
            yield failed(variable, f"{', '.join(missing)} is no interface here", f"use one of {listed}")
        else:
            yield ok(variable, named)
    if not any(cluster.environment.get(name) or os.environ.get(name) for name in INTERFACES):
        yield ok("interfaces", ", ".join(sorted(known)))


def files(cluster: ClusterConfig, runs: Path) -> Iterator[Finding]:
    """Whether runs can be written, and lie where other nodes see them."""
    place = next(path for path in (runs, *runs.absolute().parents) if path.is_dir())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=PROBE):
            pass
    except OSError as error:
        yield failed("runs", f"{place}: {error.strerror}", "runs=FOLDER, one that you may write to")
        return
    free_gib = shutil.disk_usage(place).free / 2**30
    kind = _file_system(place)
    found = f"{place} on {kind}, {free_gib:.0f} GiB free"
    if cluster.scheduler == "slurm" and kind in TEMPORARY:
        yield failed("runs", found, "compute nodes do not see it: runs=FOLDER on a shared file system")
    elif free_gib < NEEDED_GIB:
        yield warning("runs", found, "runs=FOLDER with room for checkpoints")
    else:
        yield ok("runs", found)


def _file_system(place: Path) -> str:
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[path] for path in (place.resolve(), *place.resolve().parents) if path in mounts), "unknown")
