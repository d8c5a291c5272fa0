"""The record that `up` writes and `cluster=testbed` reads: needs neither root nor torch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from piper_hpc.testbed import process

SCHEMA_VERSION = 1
DEFAULT_FOLDER = "/run/piper_hpc/testbed"
LINK_KINDS = ("node", "nic", "rack")


@dataclass(frozen=True)
class Node:
    """A Slurm node: its name, its IPv4 address, and the switch above it (as in SLURM_TOPOLOGY_ADDR)."""

    name: str
    address: str
    rack: str


@dataclass(frozen=True)
class Link:
    """A kind of link, one direction: the wire's rate as configured, and what a TCP stream got through it."""

    configured_bytes_per_s: float
    measured_bytes_per_s: float


@dataclass(frozen=True)
class Testbed:
    """A testbed that is up.

    links: by kind, "node" (between ranks of one node), "nic" (a node's link), "rack" (a rack's uplink; absent with
    one rack). environment: for Slurm's commands, and through sbatch's export for the ranks. memory_bytes: per rank.
    options: what `up` was asked for, with what --profile decided; scaling: what it is a scaled version of, and the
    check of it (see profile.py); None without --profile.
    """

    __test__: ClassVar[bool] = False  # not a pytest class, whatever its name

    schema_version: int
    created: str
    slurm_conf: str
    environment: dict[str, str]
    nodes: tuple[Node, ...]
    ranks_per_node: int
    cpu_share: float
    period_us: int
    memory_bytes: int
    links: dict[str, Link]
    options: dict[str, int | float | str]
    scaling: dict[str, Any] | None = None

    def document(self) -> dict[str, object]:
        return asdict(self)


def folder() -> Path:
    """Everything that a testbed keeps in files: PIPER_TESTBED_DIR, or /run/piper_hpc/testbed."""
    return Path(os.path.abspath(os.environ.get("PIPER_TESTBED_DIR") or DEFAULT_FOLDER))


def read() -> Testbed | None:
    """The record as `up` completed it, whether or not its daemons still run; None without one."""
    try:
        document = json.loads((folder() / "testbed.json").read_text())
    except (OSError, ValueError):
        return None
    if document.get("schema_version") != SCHEMA_VERSION:
        return None
    nodes = tuple(Node(**node) for node in document.pop("nodes"))
    links = {kind: Link(**link) for kind, link in document.pop("links").items()}
    return Testbed(nodes=nodes, links=links, **document)


def write(testbed: Testbed) -> None:
    """Complete the record; a reader sees all of it or nothing."""
    path = folder() / "testbed.json"
    path.with_suffix(".new").write_text(json.dumps(testbed.document(), indent=1) + "\n")
    path.with_suffix(".new").replace(path)


def load() -> Testbed | None:
    """The testbed that is up on this machine; None when there is none, or its controller has died."""
    testbed = read()
    if testbed is None or process.pid_of(folder(), "slurmctld") is None:
        return None
    return testbed


def counters(node_name: str) -> dict[str, int]:
    """Bytes that a node received and sent over its link so far: `rx_bytes`, `tx_bytes` of its eth0.

    Read at the other end of the same cable, where no privilege is needed: what that end sends, the node receives.
    Raises FileNotFoundError for a node that is not up.
    """
    index = node_name.removeprefix("n")
    statistics = Path(f"/sys/class/net/piper-v{index}/statistics")
    return {
        "rx_bytes": int((statistics / "tx_bytes").read_text()),
        "tx_bytes": int((statistics / "rx_bytes").read_text()),
    }
