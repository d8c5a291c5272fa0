"""Facts of a cluster at launch, before anything is measured: racks, memory, cores, how to reach Slurm."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from piper_hpc.cluster import accelerator, data_sheet, domains
from piper_hpc.cluster.calibration import SCHEMA_VERSION
from piper_hpc.cluster.measured import with_measurements
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runtime import quota
from piper_hpc.runtime.slurm import ask
from piper_hpc.spec import BENCHMARK_VERSION, QUOTA_PERIOD_US, Calibration, ClusterSpec
from piper_hpc.testbed import network, state

GIB = 2**30
ACCELERATOR = "accelerator"
"""Key of a fingerprint: the device's name in conf/accelerator; Perlmutter has nodes of two."""
QUOTA_HEADROOM = 0.9
"""Share of the cores that quotas may hand out: the rest runs the launcher, so that no rank waits for it."""


@dataclass(frozen=True)
class Machine:
    """Facts of a cluster that need no measurement.

    cpu_share: CPU quota of one local rank, in cores; None where ranks run without one. cores: what local ranks share.
    environment: what the scheduler's commands need. fingerprint: what measurements of this cluster hold for.
    granted: leaf switch of each node that a job was given, in rank order, as numbers; empty before it runs.
    """

    rack_of_node: tuple[int, ...]
    memory_bytes: int
    cores: float
    cpu_share: float | None = None
    devices_share_cores: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    fingerprint: dict[str, str] = field(default_factory=dict)
    granted: tuple[int, ...] = ()

    def spec(self, cluster: ClusterConfig, calibration: Calibration) -> ClusterSpec:
        """The ClusterSpec of the resource model with this calibration; of the allocated nodes once the job has them."""
        topology = data_sheet.topology_of(cluster)
        if topology is not None and self.granted:
            topology = domains.narrowed_to_allocation(topology, self.granted, cluster.ranks_per_node)
        known = ClusterSpec(
            name=cluster.name,
            nodes=cluster.nodes,
            ranks_per_node=cluster.ranks_per_node,
            rack_of_node=self.granted or self.rack_of_node,
            memory_bytes=self.memory_bytes,
            calibration=calibration,
            devices_share_cores=self.devices_share_cores,
            cores=self.cores,
            topology=topology,
            links=data_sheet.links_of(cluster),
            accelerator=accelerator.load_if_public(cluster.accelerator),
        )
        return with_measurements(known)

    def calibration_file(self, cluster: ClusterConfig, dtype: str, runs: Path) -> Path:
        """Where measurements of this cluster, at this size and precision, are kept; `catalogue` finds those of others.

        Those of another version of the benchmark or of the file have another name: they are measured again.
        """
        facts = self.fingerprint | {"benchmark_version": str(BENCHMARK_VERSION), "schema_version": str(SCHEMA_VERSION)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        name = f"{cluster.name}-{cluster.nodes}x{cluster.ranks_per_node}-{dtype}-{digest}.json"
        return runs.resolve() / "calibrations" / name


def describe(cluster: ClusterConfig) -> Machine:
    """The facts of the cluster that a configuration names. Raises ConfigError where it cannot hold the job."""
    if cluster.scheduler == "local":
        return _local(cluster)
    if cluster.name == "testbed":
        return _testbed(cluster)
    return _slurm(cluster)


def check_submission(cluster: ClusterConfig, machine: Machine) -> None:
    """Raise ConfigError where Slurm is out of reach from here, or the partition has too few nodes."""
    if cluster.scheduler != "slurm":
        return
    if shutil.which("sbatch") is None:
        rule = "needs sbatch on the PATH: launch on a login node"
        raise ConfigError(Problem("cluster", cluster.name, rule, "dry_run=true, or cluster=local"))
    partition = ["--partition", cluster.partition] if cluster.partition else []
    sinfo = ask(["sinfo", "--noheader", *partition, "--format", "%D"], machine.environment)
    counts = [int(word) for word in sinfo.text.split() if word.isdigit()]
    if sinfo.ok and sum(counts) < cluster.nodes:
        rule = f"partition {cluster.partition or 'default'} has {sum(counts)} nodes"
        raise ConfigError(Problem("cluster.nodes", cluster.nodes, rule, f"cluster.nodes={max(1, sum(counts))}"))


def has_accelerator() -> bool:
    """True where this machine shows an NVIDIA or AMD device; torch is not imported."""
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/kfd"))


def _memory(cluster: ClusterConfig, on_host: int) -> int:
    """Bytes that one rank may use: as configured, else its share of the host's."""
    if cluster.memory_gib_per_rank:
        return int(cluster.memory_gib_per_rank * GIB)
    if cluster.accelerator is not None:
        return accelerator.facts(cluster.accelerator).memory_bytes
    return on_host // cluster.ranks_per_node


def _racks(cluster: ClusterConfig) -> tuple[int, ...]:
    return tuple(cluster.racks) if cluster.racks is not None else (0,) * cluster.nodes


def _local(cluster: ClusterConfig) -> Machine:
    if cluster.nodes != 1:
        rule = "cluster.scheduler=local is one machine"
        raise ConfigError(Problem("cluster.nodes", cluster.nodes, rule, "cluster.nodes=1, or cluster=testbed"))
    on_device = cluster.device in ("cuda", "xpu") or (cluster.device == "auto" and has_accelerator())
    if on_device and not (cluster.memory_gib_per_rank or cluster.accelerator):
        rule = "must be given for an accelerator (GiB of one device)"
        raise ConfigError(Problem("cluster.memory_gib_per_rank", 0, rule, "cluster.memory_gib_per_rank=80"))
    cores = len(os.sched_getaffinity(0))
    ranks = cluster.ranks_per_node
    share = None
    if not on_device and cluster.quota == "auto" and quota.writable():
        share = round(min(1.0, QUOTA_HEADROOM * cores / ranks), 3)
    return Machine(
        rack_of_node=(0,),
        memory_bytes=_memory(cluster, psutil.virtual_memory().total),
        cores=float(cores),
        cpu_share=share,
        devices_share_cores=not on_device and share is None and ranks > cores,
        fingerprint={
            "host": platform.node(),
            "processor": processor(),
            "torch": version("torch"),
            "cpu_share": str(share),
            "device": "accelerator" if on_device else "cpu",
        },
    )


def _testbed(cluster: ClusterConfig) -> Machine:
    bed = state.load()
    if bed is None:
        rule = "is not up on this machine: start it as root with `python -m piper_hpc.testbed up`"
        raise ConfigError(Problem("cluster", "testbed", rule, "cluster=local"))
    for key, have in (("nodes", len(bed.nodes)), ("ranks_per_node", bed.ranks_per_node)):
        wanted = getattr(cluster, key)
        if wanted > have:
            raise ConfigError(Problem(f"cluster.{key}", wanted, f"the testbed has {have}", f"cluster.{key}={have}"))
    racks = list(dict.fromkeys(node.rack for node in bed.nodes))
    return Machine(
        rack_of_node=tuple(racks.index(node.rack) for node in bed.nodes[: cluster.nodes]),
        memory_bytes=_memory(cluster, (bed.memory_bytes or psutil.virtual_memory().total) * bed.ranks_per_node),
        cores=0.0,
        environment=dict(bed.environment),
        fingerprint={
            "processor": processor(),
            "torch": version("torch"),
            "cpu_share": str(bed.cpu_share),
            "links": json.dumps({kind: link.configured_bytes_per_s for kind, link in sorted(bed.links.items())}),
            "congestion_control": network.congestion_control(),
            "network": hashlib.sha256(Path(network.__file__).read_bytes()).hexdigest()[:8],
            # Not where it is the usual one, so that calibrations from before it was told still serve.
            **({"quota_period_us": str(bed.period_us)} if bed.period_us != QUOTA_PERIOD_US else {}),
        },
    )


def _slurm(cluster: ClusterConfig) -> Machine:
    if not (cluster.memory_gib_per_rank or cluster.accelerator):
        rule = "must be given for a Slurm cluster (GiB that one rank may use)"
        raise ConfigError(Problem("cluster.memory_gib_per_rank", 0, rule, "cluster.memory_gib_per_rank=64"))
    return Machine(
        rack_of_node=_racks(cluster),
        memory_bytes=_memory(cluster, 0),
        cores=0.0,
        fingerprint={
            "torch": version("torch"),
            **({ACCELERATOR: cluster.accelerator} if cluster.accelerator is not None else {}),
        },
    )


def processor() -> str:
    """The model of this machine's CPU, as far as the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
