"""Network counters of a node against what an exchange must send: rows whose bytes bypassed the link are refused.

MPI may take all nodes of a machine for one host (the MPICH wheel on the testbed, unless UCX_TLS=tcp,self and
UCX_NET_DEVICES=eth0 are set) and then measures memory where the name of the row says link.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from piper_hpc.microbench.groups import GroupFamily
from piper_hpc.spec import RankMap

LEAST_SHARE = 0.9
"""Counters may be read a moment before the last packet; a way round the link leaves nearly nothing on it."""
MOST_SHARE = 1.5
"""Headers and packets sent again stay well below this; more is somebody else's traffic."""
CHECKED_ABOVE_BYTES = 1 << 20
"""Beside fewer bytes than this, the barriers around an exchange count; too many on the link then mean nothing."""

INFINIBAND = Path("/sys/class/infiniband")
DEVICES = Path("/proc/self/net/dev")
"""Interfaces as this process's network namespace has them."""


@dataclass(frozen=True)
class LinkCounter:
    """Bytes that this node sent: over one network interface, or over all InfiniBand ports where `interface` is `ib`."""

    interface: str

    def sent_bytes(self) -> int:
        """So far; OSError or ValueError where the counter is gone."""
        if self.interface == "ib":
            # Counted in words of four bytes.
            return sum(4 * int(file.read_text()) for file in INFINIBAND.glob("*/ports/*/counters/port_xmit_data"))
        for line in DEVICES.read_text().splitlines():
            name, _, fields = line.partition(":")
            if name.strip() == self.interface:
                return int(fields.split()[8])
        raise ValueError(f"no network interface {self.interface} in {DEVICES}")


def link_counter(setting: str, device_type: str, environ: Mapping[str, str] = os.environ) -> LinkCounter | None:
    """The counter for `task.link_counters`: `off`, an interface, or `auto`.

    `auto` takes the interface that CPU ranks are told to use (GLOO_SOCKET_IFNAME), and InfiniBand's ports for devices.
    Fabrics that keep no such counter (Slingshot) are not watched.
    """
    if setting == "off":
        return None
    if setting != "auto":
        return LinkCounter(setting)
    if device_type != "cpu":
        return LinkCounter("ib") if any(INFINIBAND.glob("*/ports/*/counters/port_xmit_data")) else None
    name = environ.get("GLOO_SOCKET_IFNAME", "")
    return LinkCounter(name) if name and name != "lo" else None


def minimum_bytes(name: str, family: GroupFamily, bytes_: float, ranks: RankMap) -> float:
    """Lower bound of the bytes that one call of an exchange sends between nodes, over all nodes and groups.

    bytes_: of the larger of a rank's two buffers, as a row's `work`.

    Exact for p2p (there and back) and all_to_all; for the others, what any algorithm needs that adds up inside each
    node first: S (N-1) for gathering or scattering S bytes over N nodes, twice that for an all-reduce.
    """
    return sum(_of_group(name, group, bytes_, ranks) for group in family.groups)


def _of_group(name: str, group: Sequence[int], bytes_: float, ranks: RankMap) -> float:
    nodes = [ranks.node_of_rank[rank] for rank in group]
    if name.startswith("p2p"):
        return 2 * bytes_ if nodes[0] != nodes[1] else 0.0
    if name == "all_to_all":
        crossing = sum(here != there for here in nodes for there in nodes)
        return crossing * bytes_ / len(group)
    return (len(set(nodes)) - 1) * bytes_ * (2 if name == "all_reduce" else 1)


def missing_bytes(interface: str, sent_bytes: float, least: float) -> str | None:
    """Why so few bytes on the links speak against what was measured; None where they do not."""
    if sent_bytes >= LEAST_SHARE * least:
        return None
    return (
        f"{interface} sent {sent_bytes:,.0f} bytes where {least:,.0f} had to cross between nodes: they took "
        "another way (for MPICH over sockets set UCX_TLS=tcp,self UCX_NET_DEVICES=eth0)"
    )


def counter_mismatch(name: str, interface: str, sent_bytes: float, least: float) -> str | None:
    """Why the bytes that the links counted do not match those of the calls; None where they do."""
    if few := missing_bytes(interface, sent_bytes, least):
        return few
    exact = name == "all_to_all" or name.startswith("p2p")
    if exact and least > CHECKED_ABOVE_BYTES and sent_bytes > MOST_SHARE * least:
        return f"{interface} sent {sent_bytes:,.0f} bytes where {least:,.0f} were exchanged: others used the link"
    return None
