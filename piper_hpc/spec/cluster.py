"""The cluster: topology, devices and links, and the calibration measured on it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

from piper_hpc.spec.accelerator import Accelerator
from piper_hpc.spec.all_to_all import MeasuredAllToAll
from piper_hpc.spec.fits import Fit

DATA_SHEET = "data sheet"
"""`Calibration.source` of a cluster on which nothing was measured."""

IDLE = "idle/"
"""Before the name of an exchange's curve: what of it its ranks compute nothing in."""

BENCHMARK_VERSION = 12
"""Raised whenever the way of measuring changes: rows of different versions are not compared."""


class Tier(str, Enum):
    """Links between two ranks, from near to far: the smallest domain that holds both.

    pair: one module of two devices (the GCDs of an MI250X, an NVLink bridge); node: the scale-up domain, all devices
    that the node's fast link joins (one host; 18 hosts of a GB200 NVL72); switch: the nodes that share a leaf switch,
    one hop apart; rack: a rack, or a group of switches (a dragonfly group, a cell); system: everything else.
    Micro-benchmarks that know racks and no switches call another node of the same rack `rack`.
    """

    PAIR = "pair"
    NODE = "node"
    SWITCH = "switch"
    RACK = "rack"
    SYSTEM = "system"


TIERS = tuple(tier.value for tier in Tier)
"""Links from near to far: pair, node, switch, rack, system."""


@dataclass(frozen=True)
class Link:
    """What one rank gets of a link while all ranks of its node send, one way: its share of the NIC is included.

    A message of B bytes takes latency_s + B / bytes_per_s (the alpha-beta model).
    """

    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(f"{self}: latency_s must not be negative and bytes_per_s must be above 0")


@dataclass(frozen=True)
class Topology:
    """Ranks in each domain of a uniform machine, near to far; a domain that the machine lacks is None.

    Ranks fill the domains in order. `node` is the scale-up domain (see Tier): on an NVL72 machine it is 72, while a
    Slurm node, ClusterSpec.ranks_per_node, is one host of 4. Every domain holds a whole number of the next nearer
    one. Everything beyond the widest domain given is one hop of tier `system`.
    nics_per_node: NICs of one host; ranks_per_nic: ranks whose nearest NIC is the same (rails of equal NIC index).
    """

    node: int
    pair: int | None = None
    switch: int | None = None
    rack: int | None = None
    nics_per_node: int | None = None
    ranks_per_nic: int | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if min(sizes) < 1 or any(wide % near for near, wide in pairwise(sizes)):
            raise ValueError(
                f"domains of {dict(zip(TIERS, sizes, strict=False))} ranks: each must be a multiple of the next "
                "nearer one, for example pair=2 node=8 switch=32"
            )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Ranks in a pair, node, switch and rack; a domain that is absent is as large as the next nearer one."""
        pair = self.pair or 1
        switch = self.switch or self.node
        return pair, self.node, switch, self.rack or switch

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that the machine has, near to far."""
        nearer = (1, *self.sizes)
        return (*(tier for tier, near, size in zip(TIERS, nearer, self.sizes, strict=False) if size > near), TIERS[-1])


@dataclass(frozen=True)
class Curve:
    """Measured time of one operator over the work it does, for example a GEMM over its FLOPs.

    work: ascending, in the operator's unit (FLOPs, bytes or operations); seconds: time at each point, the median or
    what the rows name as their statistic;
    spread: half the 90 % interval of that time's mean, over it, at each point, dimensionless; empty where unknown (data
    sheets).
    """

    operator: str
    unit: str
    work: tuple[float, ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...]


QUOTA_PERIOD_US = 10_000
"""Of a rank's CPU quota, where no other is named."""


@dataclass(frozen=True)
class CpuQuota:
    """What a rank gets of a core. share: of one core, in every period of `period_s` seconds."""

    share: float
    period_s: float


@dataclass(frozen=True)
class Calibration:
    """Every measured operator of a cluster, and what the measurements were taken on.

    `source` names the evidence: a path of measurements, or `data sheet` where nothing was measured.
    `peak_flops` is the best measured GEMM rate of one device (FLOP/s), the denominator of MFU on a CPU.
    `exchanges`: all-to-all algorithms as measured, from which `all_to_all=auto` selects; empty where they were not.
    `fits`: latencies, rates and efficiencies with confidence intervals, where enough was measured to tell them.
    """

    source: str
    measured_at: str
    peak_flops: float
    curves: dict[str, Curve] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)
    exchanges: tuple[MeasuredAllToAll, ...] = ()
    fits: tuple[Fit, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether it rests on measurements, and not on data sheets."""
        return self.source != DATA_SHEET

    @property
    def quota(self) -> CpuQuota | None:
        """The CPU quota of a rank under which it was measured; None where there was none."""
        share = self.provenance.get("cpu_share", "None")
        if not self.measured or share == "None":
            return None
        return CpuQuota(float(share), float(self.provenance.get("quota_period_us", QUOTA_PERIOD_US)) / 1e6)

    @property
    def nodes(self) -> int | None:
        """Nodes that it was measured on, where its provenance has a `size` such as "8 nodes x 4 ranks"."""
        found = re.match(r"([1-9][0-9]*) nodes", self.provenance.get("size", "")) if self.measured else None
        return int(found[1]) if found else None


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes, their racks, their devices, and the calibration that predictions rest on.

    `devices_share_cores` is true where ranks compete for the same cores (no quota): then a stage that waits lends its
    core to the others, and a step is bound by all work over `cores` instead of by the critical stage.
    `memory_bytes` is what one rank may use. `topology` gives the domains of a uniform machine in ranks; without it they
    are the nodes and racks alone. `links`: tier -> Link, of data sheets or measured. `accelerator`: the device and what
    kernels reach of it, where that is known; its efficiency names the constants and links that were measured.
    """

    name: str
    nodes: int
    ranks_per_node: int
    rack_of_node: tuple[int, ...]
    memory_bytes: int
    calibration: Calibration
    devices_share_cores: bool = False
    cores: float = 0.0
    topology: Topology | None = None
    links: Mapping[str, Link] = field(default_factory=dict)
    accelerator: Accelerator | None = None

    @property
    def ranks(self) -> int:
        """Ranks the cluster offers."""
        return self.nodes * self.ranks_per_node
