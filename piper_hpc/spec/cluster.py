"""Where it is trained: topology, and what was measured of its devices and links."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

DATA_SHEET = "data sheet"
"""`Calibration.source` of a cluster on which nothing was measured."""

BENCHMARK_VERSION = 2
"""Raised whenever the way of measuring changes: rows of different versions are not compared."""


class Tier(str, Enum):
    """Links between two ranks, from near to far."""

    NODE = "node"
    RACK = "rack"
    SYSTEM = "system"


@dataclass(frozen=True)
class Curve:
    """Measured time of one operator over the work it does, for example a GEMM over its FLOPs.

    work: ascending, in the operator's unit (FLOPs, bytes or operations); seconds: time at each point, the median or
    what the rows name as their statistic;
    spread: half the 5-95 % range over that time at each point, dimensionless; empty where unknown (data sheets).
    """

    operator: str
    unit: str
    work: tuple[float, ...]
    seconds: tuple[float, ...]
    spread: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """Every measured operator of a cluster, and what the measurements were taken on.

    `source` names the evidence: a path of measurements, or `data sheet` where nothing was measured.
    `peak_flops` is the best measured GEMM rate of one device (FLOP/s), the denominator of MFU on a CPU.
    """

    source: str
    measured_at: str
    peak_flops: float
    curves: dict[str, Curve] = field(default_factory=dict)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether it rests on measurements, and not on data sheets."""
        return self.source != DATA_SHEET


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes, their racks, their devices, and the calibration that predictions rest on.

    `devices_share_cores` is true where ranks compete for the same cores (no quota): then a stage that waits lends its
    core to the others, and a step is bound by all work over `cores` instead of by the critical stage.
    `memory_bytes` is what one rank may use.
    """

    name: str
    nodes: int
    ranks_per_node: int
    rack_of_node: tuple[int, ...]
    memory_bytes: int
    calibration: Calibration
    devices_share_cores: bool = False
    cores: float = 0.0

    @property
    def ranks(self) -> int:
        """Ranks the cluster offers."""
        return self.nodes * self.ranks_per_node
