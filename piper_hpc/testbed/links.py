"""Check the rate of every shaped link by timed TCP transfers, in batches that do not disturb each other."""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from piper_hpc.testbed import network, transfer
from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.network import Addresses, namespace, probe
from piper_hpc.testbed.options import Options, flag
from piper_hpc.testbed.state import Link

TOLERANCE = 0.10
ATTEMPTS = 4  # noise from elsewhere on the machine slows a stream down; a wrong rate stays wrong
SECONDS = 1.0
BATCH_MBIT_PER_S = 4000.0  # together: two cores move more than twice as much
PORT = 5201
TRANSFER = (sys.executable, "-S", transfer.__file__)  # by path: it needs neither the package nor a site


@dataclass(frozen=True)
class Stream:
    """One direction of one link: who sends, who receives, and at which rate it should arrive."""

    kind: str
    label: str
    sender: str  # namespace
    receiver: str  # namespace
    address: str  # of the receiver
    port: int
    mbit_per_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.mbit_per_s * 1e6 / 8


def streams(options: Options) -> list[Stream]:
    """Every link in each direction. Probes have an unshaped link, so that a stream crosses one shaped cable only."""
    addresses = Addresses(options)
    nic, lo, uplink = options.nic_mbit_per_s, options.node_mbit_per_s, options.rack_mbit_per_s
    found = []
    for node in addresses.nodes:
        rack, name, address = addresses.rack_of(node), namespace(node), addresses.node_address(node)
        outside, port = addresses.probe_address(rack), PORT + node
        found.append(Stream("nic", f"n{node} out", name, probe(rack), outside, port, nic))
        found.append(Stream("nic", f"n{node} in", probe(rack), name, address, port, nic))
        found.append(Stream("node", f"n{node} lo", name, name, address, PORT, lo))
    for rack in addresses.racks if options.racks > 1 else ():  # a ring: each uplink once up and once down
        other = rack % options.racks + 1
        label = f"rack{rack} to rack{other}"
        found.append(Stream("rack", label, probe(rack), probe(other), addresses.probe_address(other), PORT, uplink))
    return found


def batches(wanted: Iterable[Stream]) -> list[list[Stream]]:
    """Groups to measure at once: no two streams fill the same cable, and the machine must carry a group's sum."""
    groups: list[list[Stream]] = []
    for stream in sorted(wanted, key=lambda stream: -stream.mbit_per_s):
        for group in groups:
            if sum(member.mbit_per_s for member in group) + stream.mbit_per_s <= BATCH_MBIT_PER_S:
                group.append(stream)
                break
        else:
            groups.append([stream])
    return groups


def measure(options: Options, cancelled: threading.Event) -> dict[str, Link]:
    """Measure every link, and return by kind its rate and the median of what arrived. Stops early once `cancelled`.

    Raises Fault (exit code 1) for a link that is off by more than the tolerance in every attempt.
    """
    wanted = streams(options)
    best: dict[Stream, float] = {}
    for _ in range(ATTEMPTS):
        for batch in batches(stream for stream in wanted if _error(stream, best.get(stream, 0.0)) > TOLERANCE):
            if cancelled.is_set():
                return {}
            for stream, rate in zip(batch, _transfer(batch), strict=True):
                if _error(stream, rate) < _error(stream, best.get(stream, 0.0)):
                    best[stream] = rate
    links = {}
    for kind in sorted({stream.kind for stream in wanted}):
        members = [stream for stream in wanted if stream.kind == kind]
        worst = max(members, key=lambda stream: _error(stream, best.get(stream, 0.0)))
        if _error(worst, best.get(worst, 0.0)) > TOLERANCE:
            _complain(worst, best.get(worst, 0.0))
        links[kind] = Link(worst.bytes_per_s, statistics.median(best[stream] for stream in members))
    return links


def _error(stream: Stream, bytes_per_s: float) -> float:
    return abs(bytes_per_s / stream.bytes_per_s - 1)


def _complain(stream: Stream, bytes_per_s: float) -> None:
    key = flag(f"{stream.kind}_mbit_per_s")
    reached = bytes_per_s * 8 / 1e6
    rule = f"link {stream.label} carried {reached:.1f} Mbit/s, more than {TOLERANCE:.0%} off in {ATTEMPTS} attempts"
    slower = f"{key} {max(1.0, 0.8 * reached):.0f}, or a machine with less other work"
    works = slower if reached else "sysctl -w net.bridge.bridge-nf-call-iptables=0, where a firewall filters bridges"
    raise Fault(key, f"{stream.mbit_per_s:g}", rule, works, FAILED)


def _transfer(batch: list[Stream]) -> list[float]:
    """Payload bytes per second of streams that run at once; 0.0 for one that did not get through."""
    receivers = [_start(stream.receiver, "receive", stream.address, str(stream.port), str(SECONDS)) for stream in batch]
    senders = [_start(stream.sender, "send", stream.address, str(stream.port)) for stream in batch]
    rates = []
    for process in receivers:
        try:
            answer, _ = process.communicate(timeout=15)
            rates.append(float(answer) if process.returncode == 0 else 0.0)
        except subprocess.TimeoutExpired:
            rates.append(0.0)
    for process in [*receivers, *senders]:
        process.kill()
        process.communicate()
    return rates


def _start(space: str, *arguments: str) -> subprocess.Popen[str]:
    command = network.command_in(space, *TRANSFER, *arguments)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
