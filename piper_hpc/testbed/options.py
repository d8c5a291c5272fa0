"""Options of `python -m piper_hpc.testbed up`: defaults, ranges and rules."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from piper_hpc.spec import QUOTA_PERIOD_US
from piper_hpc.testbed.faults import Fault

MIB = 2**20
MIN_QUOTA_US = 1_000  # the kernel's own lower bound of a CPU quota
RESERVED_ADDRESSES = 2  # besides one per node and two per rack: the machine itself, and the broadcast


@dataclass(frozen=True)
class Options:
    """Shape, links and devices of a testbed. Rates are those of the wire, one direction.

    node_mbit_per_s: between ranks of one node (its loopback). nic_mbit_per_s: of a node's link to its rack.
    rack_mbit_per_s: of a rack's uplink. cpu_share: cores per rank. memory_mib: per rank.
    port: slurmctld's; slurmdbd and slurmd take the next two. kill_wait_s: KillWait, from SIGTERM to SIGKILL of a job
    that is cancelled; most sites have 30. accounting: slurmdbd, or off as some small sites have it. profile, model: the
    machine and the model to be a scaled version of, which then decide rates and memory; achieved_tflop_per_s: of one of
    its devices, 0 for what is known.
    """

    nodes: int = 4
    ranks_per_node: int = 2
    racks: int = 2
    node_mbit_per_s: float = 2000.0
    nic_mbit_per_s: float = 400.0
    rack_mbit_per_s: float = 400.0
    cpu_share: float = 0.2
    period_us: int = QUOTA_PERIOD_US
    memory_mib: int = 1536
    subnet: str = "10.77.0.0/24"
    port: int = 26817
    kill_wait_s: int = 10
    accounting: str = "slurmdbd"
    profile: str = ""
    model: str = ""
    achieved_tflop_per_s: float = 0.0

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def rack_of(self, node: int) -> int:
        """Rack (from 0) of a node (from 0): contiguous blocks, sizes as even as they can be."""
        return node * self.racks // self.nodes

    def matches(self, present: Mapping[str, object]) -> bool:
        """Whether a testbed that came up with `present` is what these ask for, whatever its scaling decided."""
        decided = DECIDED if self.profile else ()
        return all(present.get(key) == value for key, value in self.document().items() if key not in decided)

    def document(self) -> dict[str, int | float | str]:
        return asdict(self)


DECIDED = ("node_mbit_per_s", "nic_mbit_per_s", "rack_mbit_per_s", "memory_mib")
"""What --profile decides, by what a rank is measured to compute."""

HELP = {
    "nodes": "number of nodes",
    "ranks_per_node": "ranks (devices) of a node",
    "racks": "number of racks, each a switch with an uplink",
    "node_mbit_per_s": "rate between ranks of one node",
    "nic_mbit_per_s": "rate of a node's link, each direction",
    "rack_mbit_per_s": "rate of a rack's uplink, each direction",
    "cpu_share": "share of a core that a rank may use",
    "period_us": "period of the CPU quota",
    "memory_mib": "memory that a rank may use",
    "subnet": "IPv4 network of the nodes",
    "port": "port of slurmctld; the next two are taken as well",
    "kill_wait_s": "seconds that Slurm gives a cancelled job to end by itself",
    "accounting": "slurmdbd, or off: what sacct knows",
    "profile": "machine of conf/cluster whose ratio of communication to compute to scale, for example frontier",
    "model": "model of conf/model whose MoE layer to scale, with --profile",
    "achieved_tflop_per_s": "what a device of the profile achieves; 0: what is published",
}


def flag(key: str) -> str:
    """The command-line flag of an option."""
    return "--" + key.replace("_", "-")


def parse(given: Mapping[str, str | None], cores: int | None = None, memory_mib: int | None = None) -> Options:
    """Options from the text of the flags that were given. `cores` and `memory_mib` describe the machine.

    Defaults fit the machine: fewer racks with fewer nodes, a smaller share and less memory where ranks are many.
    What is given explicitly is checked and never changed. Raises Fault (exit code 2).
    """
    cores = cores or len(os.sched_getaffinity(0))
    memory_mib = memory_mib or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB
    base = Options()
    nodes = _whole(given, "nodes", base.nodes, 1, 64)
    ranks_per_node = _whole(given, "ranks_per_node", base.ranks_per_node, 1, 64)
    racks = _whole(given, "racks", min(base.racks, nodes), 1, nodes, f" (nodes={nodes})")
    period_us = _whole(given, "period_us", base.period_us, 1_000, 1_000_000)
    ranks = nodes * ranks_per_node
    # A tenth of the cores stays with the daemons, so that no rank waits for them.
    share = _round_down(0.9 * cores / ranks, 3)
    cpu_share = _share(given, min(base.cpu_share, share), share, period_us, cores, ranks)
    fair_mib = int(0.75 * memory_mib / ranks)
    _profile(given)
    options = Options(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        racks=racks,
        node_mbit_per_s=_rate(given, "node_mbit_per_s", base.node_mbit_per_s),
        nic_mbit_per_s=_rate(given, "nic_mbit_per_s", base.nic_mbit_per_s),
        rack_mbit_per_s=_rate(given, "rack_mbit_per_s", base.rack_mbit_per_s),
        cpu_share=cpu_share,
        period_us=period_us,
        memory_mib=_whole(given, "memory_mib", min(base.memory_mib, fair_mib), 16, 2**30),
        subnet=_subnet(given.get("subnet") or base.subnet, nodes + 2 * racks + RESERVED_ADDRESSES),
        port=_whole(given, "port", base.port, 1024, 65533),
        kill_wait_s=_whole(given, "kill_wait_s", base.kill_wait_s, 1, 600),
        accounting=_accounting(given.get("accounting") or base.accounting),
        profile=given.get("profile") or "",
        model=given.get("model") or "",
        achieved_tflop_per_s=_achieved(given.get("achieved_tflop_per_s")),
    )
    if ranks * options.memory_mib > memory_mib:
        rule = f"{ranks} ranks x {options.memory_mib} MiB must fit into this machine's {memory_mib} MiB"
        raise Fault(flag("memory_mib"), options.memory_mib, rule, f"{flag('memory_mib')} {fair_mib}")
    return options


def _whole(given: Mapping[str, str | None], key: str, default: int, low: int, high: int, why: str = "") -> int:
    text = given.get(key)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        rule = f"must be a whole number from {low} to {high}{why}"
        raise Fault(flag(key), text, rule, f"{flag(key)} {min(max(default, low), high)}")
    return value


def _profile(given: Mapping[str, str | None]) -> None:
    """A profile needs a model, and decides what then cannot be given."""
    profile, model = given.get("profile"), given.get("model")
    if bool(profile) != bool(model):
        key, value = ("profile", profile) if profile else ("model", model)
        rule = "a machine and a model go together"
        raise Fault(flag(key), value, rule, f"{flag('profile')} frontier {flag('model')} deepseek_v2")
    for key in DECIDED if profile else ():
        if given.get(key) is not None:
            raise Fault(flag(key), given[key], f"is decided by {flag('profile')}", f"up without {flag(key)}")
    if given.get("achieved_tflop_per_s") is not None and not profile:
        rule = f"is of the machine that {flag('profile')} names"
        works = f"{flag('profile')} frontier {flag('model')} deepseek_v2 {flag('achieved_tflop_per_s')} 100"
        raise Fault(flag("achieved_tflop_per_s"), given["achieved_tflop_per_s"], rule, works)


def _accounting(text: str) -> str:
    if text not in ("slurmdbd", "off"):
        raise Fault(flag("accounting"), text, "must be slurmdbd or off", f"{flag('accounting')} off")
    return text


def _achieved(text: str | None) -> float:
    value = 0.0 if text is None else _number(text)
    if not 0 <= value <= 1e5:
        key = flag("achieved_tflop_per_s")
        raise Fault(key, text, "must be a number of TFLOP/s from 0 to 100000", f"{key} 100")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def _rate(given: Mapping[str, str | None], key: str, default: float) -> float:
    text = given.get(key)
    if text is None:
        return default
    value = _number(text)
    if not 1 <= value <= 100_000:
        raise Fault(flag(key), text, "must be a number of Mbit/s from 1 to 100000", f"{flag(key)} {default:g}")
    return value


def _share(
    given: Mapping[str, str | None], default: float, most: float, period_us: int, cores: int, ranks: int
) -> float:
    text = given.get("cpu_share")
    value = default if text is None else _number(text)
    if not 0 < value <= 1:
        works = f"{flag('cpu_share')} {default:g}"
        raise Fault(flag("cpu_share"), text, "must be a number of cores above 0 and at most 1", works)
    if ranks * value >= cores:
        rule = f"{ranks} ranks x {value:g} cores must stay under this machine's {cores} cores"
        raise Fault(flag("cpu_share"), f"{value:g}", rule, f"{flag('cpu_share')} {most:g}")
    if value * period_us < MIN_QUOTA_US:
        rule = f"share x period ({period_us} us) must be at least {MIN_QUOTA_US} us"
        period = min(1_000_000, -(-MIN_QUOTA_US * 1000 // max(1, int(value * 1000))))
        raise Fault(flag("cpu_share"), f"{value:g}", rule, f"{flag('period_us')} {period}, or fewer ranks")
    return value


def _round_down(value: float, digits: int) -> float:
    return int(value * 10**digits) / 10**digits


def _subnet(text: str, addresses: int) -> str:
    example = f"{flag('subnet')} {Options.subnet}"
    try:
        network = ipaddress.IPv4Network(text)
    except ValueError as error:
        raise Fault(flag("subnet"), text, f"must be an IPv4 network ({error})", example) from None
    if not network.is_private or network.num_addresses <= addresses:
        rule = f"must be a private network with more than {addresses} addresses"
        raise Fault(flag("subnet"), text, rule, example)
    return str(network)


assert set(HELP) == {field.name for field in fields(Options)}
