"""Nodes as network namespaces, racks as bridges, and every link shaped in both directions.

                      piper-spine                 the machine itself (slurmctld, slurmdbd) sits here
                     /           \\                uplinks: a shaped veth pair each
              piper-r1           piper-r2         one bridge per rack
              /      \\           /      \\          node links: a veth pair each, shaped at both ends
         piper-n1  piper-n2  piper-n3  piper-n4   eth0 and a shaped lo

A queue limits what a device sends. With the sending end alone, three senders put three times the rate into one
receiver: so the far end of each cable is shaped as well. Queues are deep, because HPC fabrics hold traffic back and do
not drop. As in a fabric, blocks for one receiver do not hold up those for another, nor data of one direction what
acknowledges the other's: in one deep queue for all, an even all-to-all fills three quarters of its links.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.options import Options

PREFIX = "piper-"
SPINE = "piper-spine"
NAMESPACES = Path("/run/netns")
MTU = 9000  # jumbo frames, as on HPC fabrics: the headers cost 1 % of the rate, not 4
MACHINE_MAC = "02:70:69:70:65:72"
QUEUE_BYTES = 32 * 2**20
CABLE_BURST_BYTES = 64 * 2**10
LO_BURST_BYTES = 512 * 2**10  # loopback segments reach 64 KiB, and a burst that small starves every connection
QUANTUM_BYTES = 2 * MTU
ACK_FILTER = "match u16 0 0xff80 at 2 match ip protocol 6 0xff match u8 0x10 0xff at 33"
"""Of an IP packet: less than 128 bytes, of TCP, and of its flags ACK alone, as short data mostly has PSH too. If that
overtook the data before it, they would be taken for lost."""
SYSCTL = Path("/proc/sys/net/ipv4")
TIMESTAMPS = "tcp_timestamps"
"""Off: an acknowledgement that goes first is newer than the data before it, which the receiver would then throw away as
old (RFC 7323, section 5)."""
RTO_MIN = "1s"
"""Of the retransmission timer, as in RFC 6298: nothing is dropped here, and what an all-to-all has in its queues takes
longer than the kernel's fifth of a second."""
BURST_S = 0.002  # at high rates: what the timer's wake-ups may leave unsent


@dataclass(frozen=True)
class Addresses:
    """Names and addresses that follow from the options."""

    options: Options

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.options.subnet)

    @property
    def machine_address(self) -> str:
        """Of slurmctld and slurmdbd: the subnet's last."""
        return str(self.network[-2])

    @property
    def nodes(self) -> range:
        """Numbers of the nodes, from 1; node i is called n<i>, lives in piper-n<i>, behind the cable piper-v<i>."""
        return range(1, self.options.nodes + 1)

    @property
    def racks(self) -> range:
        return range(1, self.options.racks + 1)

    def node_address(self, node: int) -> str:
        return str(self.network[node])

    def probe_address(self, rack: int) -> str:
        """Of the host with an unshaped link that measures a rack's links, while they are measured."""
        return str(self.network[-2 - rack])

    def rack_of(self, node: int) -> int:
        return self.options.rack_of(node - 1) + 1


def command_in(space: str, *command: str) -> list[str]:
    """The command, to run in a network namespace. nsenter, not `ip netns exec`: that one remounts /sys and hides the
    control groups from slurmd."""
    return ["nsenter", f"--net={NAMESPACES / space}", *command]


def namespace(node: int) -> str:
    return f"{PREFIX}n{node}"


def probe(rack: int) -> str:
    return f"{PREFIX}p{rack}"


def build(options: Options) -> None:
    """Make bridges, namespaces and cables, and shape them."""
    addresses = Addresses(options)
    top = SPINE if options.racks > 1 else f"{PREFIX}r1"
    lines = [f"link add {SPINE} mtu {MTU} type bridge", f"link set {SPINE} up"] if options.racks > 1 else []
    for rack in addresses.racks:
        lines += [f"link add {PREFIX}r{rack} mtu {MTU} type bridge", f"link set {PREFIX}r{rack} up"]
        if options.racks > 1:
            down, up = f"{PREFIX}u{rack}", f"{PREFIX}s{rack}"
            lines += [
                f"link add {down} mtu {MTU} type veth peer name {up} mtu {MTU}",
                f"link set {down} master {PREFIX}r{rack} up",
                f"link set {up} master {SPINE} up",
            ]
        lines += _host(probe(rack), f"{PREFIX}q{rack}", rack)
    for node in addresses.nodes:
        lines += _host(namespace(node), f"{PREFIX}v{node}", addresses.rack_of(node))
    # Given an address of its own, a bridge keeps it when its ports change, and the nodes need not ask again.
    lines.append(f"link set {top} address {MACHINE_MAC}")
    lines.append(f"addr add {addresses.machine_address}/{addresses.network.prefixlen} dev {top}")
    _batch("ip", lines)
    address_of = {namespace(node): addresses.node_address(node) for node in addresses.nodes}
    address_of |= {probe(rack): addresses.probe_address(rack) for rack in addresses.racks}
    for name, address in address_of.items():
        inside = [
            f"addr add {address}/{addresses.network.prefixlen} dev eth0",
            "link set lo up",
            "link set eth0 up",
            f"route change {addresses.network} dev eth0 src {address} rto_min {RTO_MIN}",
        ]
        _batch("ip", inside, name)
        _run(command_in(name, "tee", str(SYSCTL / TIMESTAMPS)), "0")
    _shape(addresses)


def congestion_control() -> str:
    """TCP's on all nodes: they take this machine's."""
    return (SYSCTL / "tcp_congestion_control").read_text().strip()


def drop_probes(options: Options) -> None:
    """Remove the hosts that measured: only the nodes stay."""
    for rack in Addresses(options).racks:
        _remove(probe(rack), f"{PREFIX}q{rack}")


def existing() -> tuple[list[str], list[str]]:
    """Namespaces and devices of a testbed on this machine, whole or half built."""
    spaces = sorted(path.name for path in NAMESPACES.glob(f"{PREFIX}*"))
    return spaces, sorted(path.name for path in Path("/sys/class/net").glob(f"{PREFIX}*"))


def processes_in_namespaces() -> list[int]:
    """Processes in our namespaces: Slurm's daemons, its steps, and whatever they started."""
    spaces = [status for name in existing()[0] if (status := _stat(NAMESPACES / name))]
    outside = [status for place in ("self", "1") if (status := _stat(Path(f"/proc/{place}/ns/net")))]
    spaces = [space for space in spaces if not any(os.path.samestat(space, other) for other in outside)]
    found = []
    for entry in os.listdir("/proc") if spaces else ():
        home = _stat(Path(f"/proc/{entry}/ns/net")) if entry.isdigit() else None
        if home and any(os.path.samestat(home, space) for space in spaces):
            found.append(int(entry))
    return found


def inside() -> bool:
    """Whether this very process lives in a node's namespace."""
    own = _stat(Path("/proc/self/ns/net"))
    spaces = [_stat(NAMESPACES / name) for name in existing()[0]]
    return own is not None and any(space is not None and os.path.samestat(own, space) for space in spaces)


def remove_all(also_folder: bool) -> None:
    """Remove every namespace, cable and bridge, in an order that the kernel completes at once.

    `also_folder`: and the mount that `ip netns` made for the first namespace on this machine, if it is empty.
    """
    spaces, devices = existing()
    for device in devices:
        _remove(None, device)  # before its namespace: the kernel drops a namespace's devices some time later
    for space in spaces:
        _remove(space, None)
    if also_folder and NAMESPACES.exists() and not any(NAMESPACES.iterdir()):
        subprocess.run(["umount", str(NAMESPACES)], capture_output=True, check=False)
        NAMESPACES.rmdir()


def overlapping(subnet: str) -> str | None:
    """A route of this machine that the subnet would collide with."""
    network = ipaddress.IPv4Network(subnet)
    routes = json.loads(_run(["ip", "-4", "-j", "route", "show", "table", "all"]) or "[]")
    for route in routes:
        if route["dst"] == "default" or route.get("dev", "").startswith(PREFIX):
            continue
        if ipaddress.IPv4Network(route["dst"], strict=False).overlaps(network):
            return f"{route['dst']} dev {route.get('dev', '?')}"
    return None


def _host(space: str, cable: str, rack: int) -> list[str]:
    return [
        f"netns add {space}",
        f"link add {cable} mtu {MTU} type veth peer name eth0 netns {space} mtu {MTU}",
        f"link set {cable} master {PREFIX}r{rack} up",
    ]


def _shape(addresses: Addresses) -> None:
    options = addresses.options
    nic, uplink = options.nic_mbit_per_s, options.rack_mbit_per_s
    outside = [line for node in addresses.nodes for line in _cable(f"{PREFIX}v{node}", nic)]
    if options.racks > 1:
        outside += [line for rack in addresses.racks for end in "us" for line in _cable(f"{PREFIX}{end}{rack}", uplink)]
    _batch("tc", outside)
    for node in addresses.nodes:
        others = [addresses.node_address(other) for other in addresses.nodes if other != node]
        _batch("tc", [*_cable("eth0", nic, others), _tbf("lo", options.node_mbit_per_s)], namespace(node))


def _tbf(device: str, mbit_per_s: float) -> str:
    burst_bytes = max(LO_BURST_BYTES, int(mbit_per_s * 1e6 / 8 * BURST_S))
    return f"qdisc add dev {device} root tbf rate {mbit_per_s * 1e6:.0f}bit burst {burst_bytes} limit {QUEUE_BYTES}"


def _cable(device: str, mbit_per_s: float, receivers: Sequence[str] = ()) -> list[str]:
    """One rate for what a device sends. Acknowledgements go first; the rest in turn among the receivers (addresses)
    that have something to be sent, all others being one more."""
    burst = max(CABLE_BURST_BYTES, int(mbit_per_s * 1e6 / 8 * BURST_S))
    limits = f"ceil {mbit_per_s * 1e6:.0f}bit burst {burst} cburst {burst} quantum {QUANTUM_BYTES}"
    share = f"htb rate {mbit_per_s * 1e6 / (len(receivers) + 2):.0f}bit {limits}"
    acknowledgements, others, first = 2, 3, 4
    lines = [
        f"qdisc add dev {device} root handle 1: htb default {others}",
        f"class add dev {device} parent 1: classid 1:1 htb rate {mbit_per_s * 1e6:.0f}bit {limits}",
        f"class add dev {device} parent 1:1 classid 1:{acknowledgements} {share} prio 0",
        f"filter add dev {device} parent 1: protocol ip prio 1 u32 {ACK_FILTER} flowid 1:{acknowledgements}",
    ]
    for number in range(others, first + len(receivers)):
        lines.append(f"class add dev {device} parent 1:1 classid 1:{number:x} {share} prio 1")
    for number, address in enumerate(receivers, start=first):
        match = f"u32 match ip dst {address}/32 flowid 1:{number:x}"
        lines.append(f"filter add dev {device} parent 1: protocol ip prio 2 {match}")
    handles = [f"1:{number:x}" for number in range(acknowledgements, first + len(receivers))]
    return lines + [f"qdisc add dev {device} parent {handle} bfifo limit {QUEUE_BYTES}" for handle in handles]


def _batch(tool: str, lines: list[str], space: str | None = None) -> None:
    _run([tool, *(["-n", space] if space else []), "-batch", "-"], "\n".join(lines) + "\n")


def _run(command: list[str], text: str = "") -> str:
    answer = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if answer.returncode:
        rule = f"failed: {answer.stderr.strip()}"
        works = "a kernel with namespaces, veth, bridge, sch_htb, sch_tbf and cls_u32, and a writable /proc/sys/net"
        raise Fault("network", " ".join(command), rule, works, FAILED)
    return answer.stdout


def _remove(space: str | None, device: str | None) -> None:
    if device and Path(f"/sys/class/net/{device}").exists():
        # Removing one end of a cable removes the other: that it is gone already is no error.
        subprocess.run(["ip", "link", "del", device], capture_output=True, check=False)
    if space and (NAMESPACES / space).exists():
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        with contextlib.suppress(FileNotFoundError):  # a crash may have left the file without its mount
            (NAMESPACES / space).unlink()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None
