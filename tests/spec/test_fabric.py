"""Which network a job used: lines that libraries print, counters of two moments, and what speaks of a fallback.

Lines are as printed in public: NERSC's nccl-ofi tests and aws-ofi-nccl (cxi), the LUMI training (RCCL), NVIDIA/nccl
src/transport/net_ib/init.cc and issues (IB), ml-engineering's network debugging page and public RCCL logs (sockets).
"""

from __future__ import annotations

import pytest

from piper_hpc.spec.fabric import Fabric, Traffic, crossed, fabric_of_log, fallbacks, of_all_nodes

CXI = """step 0 of 4
nid001:99:99 [0] NCCL INFO Bootstrap : Using hsn0:10.249.1.1<0>
nid001:99:99 [0] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.19.0
nid001:99:99 [0] NCCL INFO NET/OFI Selected provider is cxi, fabric is cxi (found 4 nics)
nid001:99:99 [0] NCCL INFO Using network AWS Libfabric
"""
RCCL = """NCCL INFO NET/OFI Using aws-ofi-rccl 1.4.0
NCCL INFO NET/OFI Selected Provider is cxi
NCCL INFO Using network AWS Libfabric
"""
IB = """hostA:31842:31905 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB eth0:10.0.4.19<0>
hostA:31842:31905 [0] NCCL INFO Initialized NET plugin IB
hostA:31842:31905 [0] NCCL INFO Assigned NET plugin IB to comm
hostA:31842:31905 [0] NCCL INFO Using network IB
"""
FELL_BACK = """node [0] NCCL INFO NET/Plugin: Could not find: librccl-net.so. Using internal network plugin.
node [0] NCCL INFO NET/IB : No device found.
node [0] NCCL INFO NET/IB : Using [RO]; OOB eth0:10.0.4.51<0>
node [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.4.51<0> [1]veth37:fe80::d1ff:fe4f:1e35%veth37<0>
node [0] NCCL INFO Assigned NET plugin Socket to comm
node [0] NCCL INFO Using network Socket
"""


@pytest.mark.parametrize(
    ("log", "fabric", "kind", "shown"),
    [
        (CXI, Fabric("NET/OFI", "cxi"), "cxi", "NET/OFI cxi"),
        (RCCL, Fabric("NET/OFI", "cxi"), "cxi", "NET/OFI cxi"),
        (IB, Fabric("NET/IB", interfaces=("mlx5_0", "mlx5_1")), "ib", "NET/IB mlx5_0,mlx5_1"),
        (FELL_BACK, Fabric("NET/Socket", interfaces=("eth0", "veth37")), "socket", "NET/Socket eth0,veth37"),
        # libfabric loads, and finds TCP alone: the plugin's name is the same.
        (CXI.replace("cxi, fabric is cxi", "tcp;ofi_rxm"), Fabric("NET/OFI", "tcp;ofi_rxm"), "socket", None),
        # A version, or a choice of subsystems, that does not print what it took.
        (IB.split("\n")[0], Fabric("NET/IB", interfaces=("mlx5_0", "mlx5_1")), "ib", None),
        ("NCCL INFO NET/Socket : Using [0]enp67s0:1.2.3.4<0>", Fabric("NET/Socket", "", ("enp67s0",)), "socket", None),
        ("NCCL INFO Using network UCX", Fabric("NET/UCX"), "", "NET/UCX"),
    ],
)  # fmt: skip
def test_what_the_library_prints_names_the_network(log: str, fabric: Fabric, kind: str, shown: str | None) -> None:
    found = fabric_of_log(log.splitlines(keepends=True))
    assert found == fabric and found.kind == kind
    assert shown is None or str(found) == shown


def test_a_log_without_such_lines_names_none() -> None:
    assert fabric_of_log(["step 1\n", "NCCL version 2.27.5+cuda12.9\n", "NET/IB : Using [RO]; OOB eth0\n"]) is None


def test_counters_are_subtracted_and_summed_over_nodes() -> None:
    before = [Traffic("hsn0", "socket", 5, 7), Traffic("cxi0", "cxi", 100, 100), Traffic("reset", "cxi", 9, 9)]
    after = [
        Traffic("cxi0", "cxi", 1100, 150), Traffic("hsn0", "socket", 6, 7), Traffic("reset", "cxi", 0, 0),
        Traffic("new", "ib", 3, 3),
    ]  # fmt: skip
    node = crossed(before, after)
    assert node == [Traffic("cxi0", "cxi", 1000, 50), Traffic("hsn0", "socket", 1, 0)]
    assert of_all_nodes([node, node]) == [Traffic("cxi0", "cxi", 2000, 100), Traffic("hsn0", "socket", 2, 0)]


OFI, SOCKET, GLOO = Fabric("NET/OFI", "cxi"), Fabric("NET/Socket", interfaces=("hsn0",)), Fabric("gloo")
GB = 10**9


def sent(sockets: int, cards: int | None) -> list[Traffic]:
    return [Traffic("hsn0", "socket", sockets, 0), *([] if cards is None else [Traffic("cxi0", "cxi", cards, 0)])]


@pytest.mark.parametrize(
    ("expected", "said", "traffic", "why"),
    [
        ("cxi", OFI, sent(GB // 100, 40 * GB), None),
        ("cxi", SOCKET, sent(40 * GB, 41 * GB), "NET/Socket hsn0 on all 2 nodes, where cxi was expected"),
        ("ib", OFI, [], "NET/OFI cxi on all 2 nodes, where ib was expected"),
        ("socket", OFI, sent(0, GB), "where socket was expected"),
        # The library said nothing: cards count what sockets send over them, and no more than that was sent.
        ("cxi", None, sent(40 * GB, 41 * GB), "all 2 nodes sent 80,000,000,000 bytes through sockets and 82,000"),
        ("cxi", None, sent(40 * GB, 0), "80,000,000,000 bytes through sockets and 0 over cxi cards"),
        ("cxi", None, sent(GB, 40 * GB), None),
        ("cxi", None, sent(10**6, 10**6), None),  # a rendezvous
        ("cxi", None, sent(40 * GB, None), None),  # nobody counts the cards
        # Files go through sockets, and more of them than messages is no fallback; cards that sent nothing are one.
        ("cxi", OFI, sent(40 * GB, 10 * GB), None),
        ("cxi", OFI, sent(40 * GB, 0), "0 over cxi cards"),
        # gloo has nothing but sockets.
        ("cxi", GLOO, sent(40 * GB, 0), None),
        (None, SOCKET, sent(40 * GB, 0), None),
    ],
)  # fmt: skip
def test_a_fallback_is_told(expected: str | None, said: Fabric | None, traffic: list[Traffic], why: str | None) -> None:
    told = fallbacks(expected, {"n1": said, "n2": said}, {"n1": traffic, "n2": traffic})
    assert len(told) == (why is not None)
    assert why is None or why in told[0]
    assert fallbacks(expected, {"n1": said}, {"n1": traffic}) == [], "one node sends nothing"


def test_a_single_node_that_fell_back_is_named() -> None:
    said = {"n1": OFI, "n2": SOCKET, "n3": OFI}
    assert fallbacks("cxi", said, {}) == ["NET/Socket hsn0 on 1 of 3 nodes (n2), where cxi was expected"]
