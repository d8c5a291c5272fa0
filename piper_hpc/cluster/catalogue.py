"""Which of the kept calibrations serves a run: each holds for a cluster, device and type of number, and for any number
of nodes whose links it measured."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.cluster.machine import ACCELERATOR, Machine
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runs import RunFolder
from piper_hpc.runs.folder import RecordError
from piper_hpc.spec import TIERS, Calibration, Tier


@dataclass(frozen=True)
class Kept:
    """A calibration in a file, and the number of nodes that it was measured on."""

    path: Path
    nodes: int
    calibration: Calibration

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers over which messages were timed, near to far."""
        return tuple(tier for tier in TIERS if f"p2p/{tier}" in self.calibration.curves)

    def reaches(self, needed: Sequence[str]) -> bool:
        """Whether the widest of the tiers was measured, or a wider one: a wider link stands in for a nearer one, and
        predictions say so, but nothing near speaks for a wider one."""
        widest = max(map(TIERS.index, needed), default=-1)
        return widest <= max(map(TIERS.index, self.tiers), default=-1)


def kept(machine: Machine, cluster: ClusterConfig, dtype: str, runs: Path) -> list[Kept]:
    """The calibrations of this cluster, device, ranks a node, type and versions, fewest nodes first.

    Files of before an accelerator was among what they hold for are read too, unless the run that measured one says it
    had another. Raises CalibrationError for a file that is torn.
    """
    found = [
        Kept(path, nodes, calibrations.load(path))
        for path, nodes in _files(machine.calibration_file(cluster, dtype, runs), cluster).items()
    ]
    accelerator = machine.fingerprint.get(ACCELERATOR)
    if accelerator is not None:
        before = {key: value for key, value in machine.fingerprint.items() if key != ACCELERATOR}
        old = replace(machine, fingerprint=before).calibration_file(cluster, dtype, runs)
        for path, nodes in _files(old, cluster).items():
            calibration = calibrations.load(path)
            named = _accelerator_of_run(calibration, runs)
            if named is not None:
                calibration = replace(calibration, provenance={**calibration.provenance, ACCELERATOR: named})
            if named in (None, accelerator):
                found.append(Kept(path, nodes, calibration))
    return sorted(found, key=lambda each: (each.nodes, each.path.name))


def choose(found: Sequence[Kept], nodes: int, needed: Sequence[str]) -> Kept | None:
    """The calibration for a run on `nodes` nodes whose ranks have links of the tiers `needed`; None where none serves.

    One serves that was measured on as many nodes, or that reaches (Kept.reaches). Of several the one that measured most
    of these tiers is taken, of those the nearest in the number of nodes (by ratio), of those the newest.
    """

    def rank(each: Kept) -> tuple[int, float, float, str]:
        missing = len(set(needed) - set(each.tiers))
        return missing, abs(math.log2(each.nodes / nodes)), -_measured_s(each.calibration), each.path.name

    return min((each for each in found if each.nodes == nodes or each.reaches(needed)), key=rank, default=None)


def needed_tiers(machine: Machine, cluster: ClusterConfig) -> tuple[str, ...]:
    """The tiers between ranks on the nodes of a cluster, near to far, as a micro-benchmark on them would name them:
    node, rack (another node below the same leaf switch) and system; by the nodes granted, once a job has them."""
    leaves = _leaves(machine, cluster)
    found = {Tier.NODE: cluster.ranks_per_node > 1, Tier.RACK: len(set(leaves)) < len(leaves)}
    found[Tier.SYSTEM] = len(set(leaves)) > 1
    return tuple(tier.value for tier, there in found.items() if there)


def _leaves(machine: Machine, cluster: ClusterConfig) -> Sequence[int]:
    """The leaf switch of every node, by number."""
    domains = cluster.topology
    if machine.granted or cluster.racks is not None or domains is None:
        return machine.granted or machine.rack_of_node
    leaf = domains.nodes_per_switch or domains.nodes_per_rack
    hosts = domains.hosts_per_node * leaf if leaf else cluster.nodes
    return [host // hosts for host in range(cluster.nodes)]


def _files(named: Path, cluster: ClusterConfig) -> Mapping[Path, int]:
    """Files of the name `named` for any number of nodes, with that number."""
    head = f"{cluster.name}-"
    tail = named.name.removeprefix(f"{head}{cluster.nodes}")
    pattern = re.compile(f"{re.escape(head)}([1-9][0-9]*){re.escape(tail)}")
    files = sorted(named.parent.iterdir()) if named.parent.is_dir() else []
    return {path: int(match[1]) for path in files if (match := pattern.fullmatch(path.name))}


def _accelerator_of_run(calibration: Calibration, runs: Path) -> str | None:
    """The accelerator that the run which measured a calibration was configured with; None where that is not known."""
    try:
        named = RunFolder(runs / calibration.provenance.get("run", "")).config()["cluster"]["accelerator"]
    except (RecordError, KeyError, TypeError):
        return None
    return None if named is None else str(named)


def _measured_s(calibration: Calibration) -> float:
    """When it was measured, in seconds since 1970; 0 where that is not known."""
    return datetime.fromisoformat(calibration.measured_at).timestamp() if calibration.measured_at else 0.0
