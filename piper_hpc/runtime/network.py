"""What this node's network counted, and what this rank's communication library said: read before and after a task."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path

import psutil

from piper_hpc.spec.fabric import CXI, IB, SOCKET, Fabric, Traffic, fabric_of_log

SYS = Path("/sys")
LOOPBACK = "lo"
NCCL_LOG = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
"""What makes NCCL and RCCL say which network they take: a few lines for each communicator and connection."""


def ask_library(environ: MutableMapping[str, str]) -> None:
    """Let NCCL name its network in this rank's log, unless the user has said how much it shall print."""
    if "NCCL_DEBUG" not in environ:
        environ.update({**NCCL_LOG, **{name: environ[name] for name in NCCL_LOG if name in environ}})


def said_in(log: Path) -> Fabric | None:
    """What the library said in this process's own log; None where it said nothing, or the log cannot be read."""
    # NCCL prints through C's stdio, which keeps back lines that go to a file.
    ctypes.CDLL(None).fflush(None)
    with suppress(OSError), log.open(errors="replace") as lines:
        return fabric_of_log(lines)
    return None


def counters(sys: Path = SYS) -> list[Traffic]:
    """Bytes so far over every interface and card of this node; what is not there, or may not be read, is left out.

    Interfaces are those of this process's network namespace, as sockets use them. Cards count all that they send:
    RDMA, which interfaces never see, and sockets.
    """
    return [*_interfaces(sys), *_cards(sys)]


def _interfaces(sys: Path) -> Iterator[Traffic]:
    try:
        found = psutil.net_io_counters(pernic=True, nowrap=False)
    except (OSError, ValueError):
        return
    # Bridges, bonds and ends of virtual links count again what a physical interface counts, where there is one.
    physical = [name for name in found if (sys / "class/net" / name / "device").exists()]
    for name in physical or [name for name in found if name != LOOPBACK]:
        yield Traffic(name, SOCKET, found[name].bytes_sent, found[name].bytes_recv)


def _cards(sys: Path) -> Iterator[Traffic]:
    # The InfiniBand architecture counts in words of four bytes; the driver of Slingshot's cards (Cassini) writes
    # `value@time`, from a copy that it renews by itself (read so by libfabric, prov/cxi/src/cxip_telemetry.c).
    for kind, folder, sent, received, unit in (
        (IB, "class/infiniband/*/ports/*/counters", "port_xmit_data", "port_rcv_data", 4),
        (CXI, "class/cxi/*/device/telemetry", "hni_sts_tx_ok_octets", "hni_sts_rx_ok_octets", 1),
    ):
        for counted in sorted(sys.glob(folder)):
            name = counted.parts[len(sys.parts) + 2]
            if kind == IB and counted.parent.name != "1":
                name = f"{name}:{counted.parent.name}"
            with suppress(OSError, ValueError):
                out, back = (int((counted / file).read_text().partition("@")[0]) for file in (sent, received))
                yield Traffic(name, kind, unit * out, unit * back)
