"""Which network a job's messages took: what the communication library said, and what the nodes' counters say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CXI, IB, SOCKET = "cxi", "ib", "socket"
FABRICS = (CXI, IB, SOCKET)
"""Slingshot; InfiniBand, or RDMA over Ethernet; TCP. What `cluster.fabric` may expect of a site."""

ENOUGH_BYTES = 64 << 20
"""Sent by a node through sockets, below which a rendezvous and a few files may be all that there was."""
MOST_BY_SOCKETS = 0.5
"""Of what a node's cards sent, which count sockets over them as well: more than this, and messages were among it."""

_NETWORK = re.compile(r"(?:Using network|Assigned NET plugin) (.+?)(?: to comm)?\s*$")
_PROVIDER = re.compile(r"NET/OFI Selected provider is ([\w;-]+)", re.IGNORECASE)
_DEVICES = re.compile(r"NET/(IB|Socket) : Using ([^;]*)")
_DEVICE = re.compile(r"\[\d+\]([^\s:<]+)")


@dataclass(frozen=True)
class Fabric:
    """What a rank's library said it would send through: `NET/OFI`, provider `cxi`; and the devices, where named."""

    library: str
    provider: str = ""
    interfaces: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """One of FABRICS, or the provider's own name (efa). libfabric may have fallen back to TCP itself."""
        if self.library == "NET/IB" or "verbs" in self.provider:
            return IB
        if self.library in ("NET/Socket", "gloo") or self.provider.startswith(("tcp", "sockets", "udp")):
            return SOCKET
        return self.provider

    def __str__(self) -> str:
        return " ".join([self.library, *([self.provider] if self.provider else [",".join(self.interfaces)])]).rstrip()


def fabric_of_log(lines: Iterable[str]) -> Fabric | None:
    """What the first communicator of a log uses, by the lines of NCCL and RCCL at NCCL_DEBUG=INFO; None without any.

    `Using network` decides: the library names devices of networks that it tries and does not take. A version that
    does not print it takes the first that it has of plugin, IB and Socket.
    """
    provider, network = "", ""
    devices: dict[str, tuple[str, ...]] = {}
    for line in lines:
        if found := _PROVIDER.search(line):
            provider = provider or found[1]
        elif found := _DEVICES.search(line):
            devices.setdefault(found[1], tuple(_DEVICE.findall(found[2])))
        elif found := _NETWORK.search(line):
            network = found[1]
            break
    if not network:
        network = "OFI" if provider else next((name for name in ("IB", "Socket") if devices.get(name)), "")
    if not network:
        return None
    if network in ("IB", "Socket"):
        return Fabric(f"NET/{network}", interfaces=devices.get(network, ()))
    libfabric = "libfabric" in network.lower() or network == "OFI"
    return Fabric("NET/OFI" if libfabric else f"NET/{network}", provider)


@dataclass(frozen=True)
class Traffic:
    """Bytes over one interface or card; of a job, over those of this name of all its nodes. kind: one of FABRICS."""

    interface: str
    kind: str
    sent_bytes: int
    received_bytes: int


def crossed(before: Iterable[Traffic], after: Iterable[Traffic]) -> list[Traffic]:
    """What a node's counters gained; one that is new, or was set back, is left out."""
    known = {(each.kind, each.interface): each for each in before}
    gained = []
    for now in after:
        then = known.get((now.kind, now.interface))
        if then is None or now.sent_bytes < then.sent_bytes or now.received_bytes < then.received_bytes:
            continue
        sent, received = now.sent_bytes - then.sent_bytes, now.received_bytes - then.received_bytes
        gained.append(Traffic(now.interface, now.kind, sent, received))
    return gained


def of_all_nodes(nodes: Iterable[Iterable[Traffic]]) -> list[Traffic]:
    """The sums by kind and name of interface."""
    sent: Counter[tuple[str, str]] = Counter()
    received: Counter[tuple[str, str]] = Counter()
    for each in (each for node in nodes for each in node):
        sent[each.kind, each.interface] += each.sent_bytes
        received[each.kind, each.interface] += each.received_bytes
    return [Traffic(name, kind, sent[kind, name], received[kind, name]) for kind, name in sorted(sent)]


def sent_by_kind(traffic: Iterable[Traffic]) -> dict[str, int]:
    """Kind of interface -> bytes sent."""
    sums: Counter[str] = Counter()
    for each in traffic:
        sums[each.kind] += each.sent_bytes
    return dict(sums)


def fallbacks(
    expected: str | None, said: Mapping[str, Fabric | None], traffic: Mapping[str, Sequence[Traffic]]
) -> list[str]:
    """Why a job did not use the network that its cluster has; none where nothing speaks against it.

    expected: of FABRICS, None where the cluster's file does not say. said, traffic: of every node, by its name. Where
    a library names the expected network, counters speak against it only if the cards sent nothing: files go through
    sockets, too.
    """
    if expected is None or len(said) < 2:
        return []
    told = []
    for fabric in dict.fromkeys(said.values()):
        # gloo knows sockets alone: that ranks on CPUs use them is no fallback.
        if fabric is not None and fabric.kind != expected and fabric.library != "gloo":
            nodes = [node for node, its in said.items() if its == fabric]
            told.append(f"{fabric} on {_named(nodes, len(said))}, where {expected} was expected")
    if told:
        return told
    astray = [node for node, its in traffic.items() if _went_astray(expected, said.get(node), sent_by_kind(its))]
    if astray:
        sums = sent_by_kind(each for node in astray for each in traffic[node])
        told.append(
            f"{_named(astray, len(said))} sent {sums.get(SOCKET, 0):,} bytes through sockets and "
            f"{sums[expected]:,} over {expected} cards, which count both"
        )
    return told


def _went_astray(expected: str, said: Fabric | None, sent: Mapping[str, int]) -> bool:
    cards, sockets = sent.get(expected), sent.get(SOCKET, 0)
    if expected == SOCKET or cards is None or sockets <= ENOUGH_BYTES or (said is not None and said.library == "gloo"):
        return False
    return cards == 0 if said is not None else cards < sockets / MOST_BY_SOCKETS


def _named(nodes: Sequence[str], of: int) -> str:
    shown = ", ".join(nodes[:3]) + (", ..." if len(nodes) > 3 else "")
    return f"all {of} nodes" if len(nodes) == of else f"{len(nodes)} of {of} nodes ({shown})"
