"""Placement `pack`: sbatch options for it, the order of ranks on the nodes that Slurm allocated, and their switches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from piper_hpc.cluster import domains
from piper_hpc.cluster.domains import SwitchPath
from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.schema import ClusterConfig, TopologyConfig
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.runtime.slurm import ask
from piper_hpc.spec import Layout
from piper_hpc.testbed import state

KEY = "parallelism.placement"
LINEAR = f"{KEY}=linear"

SLURM_S = 10.0
"""Timeout of `scontrol show topology`."""


@dataclass(frozen=True)
class LeafSwitches:
    """Leaf switches, before nodes are allocated. sizes: nodes of each; nodes_per_leaf: where all are alike and their
    number is not known."""

    sizes: tuple[int, ...] = ()
    nodes_per_leaf: int = 0

    def fewest(self, nodes: int) -> int:
        """The least number of switches that hold `nodes` nodes."""
        if self.nodes_per_leaf:
            return -(-nodes // self.nodes_per_leaf)
        left, used = nodes, 0
        for size in sorted(self.sizes, reverse=True):
            if left <= 0:
                break
            left, used = left - size, used + 1
        return used


def leaf_switches(cluster: ClusterConfig, environment: Mapping[str, str]) -> LeafSwitches | None:
    """The leaf switches as the cluster's file gives them, else as Slurm does; None where neither knows any."""
    if cluster.domains == "measured":
        return None
    if cluster.switches:
        return LeafSwitches(_sizes(domains.paths_from_hostlists(cluster.switches).values()))
    if cluster.racks is not None:
        return LeafSwitches(_sizes((str(rack),) for rack in cluster.racks))
    if cluster.topology is not None and cluster.topology.nodes_per_switch:
        return LeafSwitches(nodes_per_leaf=cluster.topology.nodes_per_switch * cluster.topology.hosts_per_node)
    bed = state.load() if cluster.name == "testbed" else None
    if bed is not None:
        return LeafSwitches(_sizes((node.rack,) for node in bed.nodes))
    found = domains.paths_from_scontrol(_scontrol(environment))
    return LeafSwitches(_sizes(found.values())) if found else None


def _sizes(paths: Iterable[SwitchPath]) -> tuple[int, ...]:
    return tuple(Counter(paths).values())


def _scontrol(environment: Mapping[str, str]) -> str:
    answer = ask(["scontrol", "show", "topology"], environment, SLURM_S)
    return answer.text if answer.ok else ""


def request(cluster: ClusterConfig, layout: Layout | None, environment: Mapping[str, str]) -> dict[str, str]:
    """The sbatch options that ask for what the layout's placement wants; none for `linear`.

    Raises ConfigError for a cluster of whose topology nothing is known, and for switches that are too few or too many.
    """
    if layout is None or layout.placement != "pack":
        return {}
    if cluster.scheduler == "local":
        raise ConfigError(Problem(KEY, "pack", "one machine has no topology to pack ranks into", LINEAR))
    known = leaf_switches(cluster, environment)
    max_switches = cluster.max_switches
    if known is None:
        if cluster.domains != "measured":
            rule = (
                f"nothing is known of the topology of cluster {cluster.name}: Slurm names no switches, and the file "
                "gives neither cluster.switches, cluster.racks nor cluster.topology.nodes_per_switch"
            )
            raise ConfigError(Problem(KEY, "pack", rule, f"cluster.domains=measured, or {LINEAR}"))
        if max_switches is None:
            # Without switches, the nearest that sbatch offers: nodes that are neighbours by name.
            return {"contiguous": "", "distribution": "block"}
        known = LeafSwitches(nodes_per_leaf=cluster.nodes)  # any number of them may hold the job
    fewest = known.fewest(cluster.nodes)
    most = len(known.sizes) or cluster.nodes
    if max_switches is not None and not fewest <= max_switches <= most:
        have = f"there are {most}" if known.sizes else f"{cluster.nodes} nodes are below {most} at most"
        rule = f"{cluster.nodes} nodes need {fewest} leaf switches at least, and {have}"
        raise ConfigError(Problem("cluster.max_switches", max_switches, rule, f"cluster.max_switches={fewest}"))
    return {"switches": f"{max_switches or fewest}@{cluster.switch_wait_min}", "distribution": "block"}


def switch_paths_of_nodes(
    cluster: ClusterConfig, nodes: Sequence[str], switch_paths: Sequence[SwitchPath]
) -> tuple[list[SwitchPath], str]:
    """Switch path of each allocated node, and where it is known from.

    nodes: names, in the scheduler's order; told: what each knows of itself, in the same order, from Slurm or, where
    cluster.domains=measured, from messages that were timed. A file that names nodes goes first, then what they know;
    racks by number, and blocks of cluster.topology's sizes, hold for nodes in that order; without any, all nodes are of
    one domain.
    """
    if cluster.switches and cluster.domains != "measured":
        named = domains.paths_from_hostlists(cluster.switches)
        return [named.get(node, (f"unknown to cluster.switches: {node}",)) for node in nodes], "cluster.switches"
    if any(switch_paths):
        return list(switch_paths), "messages between nodes" if cluster.domains == "measured" else "SLURM_TOPOLOGY_ADDR"
    if cluster.racks is not None and len(cluster.racks) == len(nodes):
        return [(f"rack{rack}",) for rack in cluster.racks], "cluster.racks"
    sizes = cluster.topology
    if sizes is not None and (sizes.nodes_per_rack or sizes.nodes_per_switch):
        return [_block(host, sizes) for host in range(len(nodes))], "cluster.topology: blocks in the scheduler's order"
    return [()] * len(nodes), "nothing known: the scheduler's order"


def _block(host: int, sizes: TopologyConfig) -> SwitchPath:
    """Switch path of a Slurm node on a uniform machine whose domains are filled in order, as predictions assume."""
    node = host // sizes.hosts_per_node
    named = (("rack", sizes.nodes_per_rack), ("switch", sizes.nodes_per_switch))
    return tuple(f"{name}{node // size}" for name, size in named if size)


def nodes_of(tasks: Sequence[RankEnvironment]) -> dict[str, RankEnvironment]:
    """One task of each node, by the node's name, in the scheduler's order."""
    found: dict[str, RankEnvironment] = {}
    for task in tasks:
        found.setdefault(task.node, task)
    return found


def rank_order(tasks: Sequence[RankEnvironment], layout: Layout, cluster: ClusterConfig) -> list[int]:
    """Numbers of the tasks in the order of the ranks: nodes of one domain adjacent, a node's tasks as they are there.

    tasks: of the job, in the scheduler's order. Expert groups of whole nodes stay below one switch wherever it has room
    for all of one.
    """
    nodes = nodes_of(tasks)
    paths, _ = switch_paths_of_nodes(cluster, list(nodes), [task.switches for task in nodes.values()])
    per_node = len(tasks) // len(nodes)
    whole, rest = divmod(layout.ep * layout.etp, per_node)
    packed = domains.pack(paths, whole if whole and not rest else 1)
    names = list(nodes)
    position = {names[node]: place for place, node in enumerate(packed)}
    return sorted(range(len(tasks)), key=lambda t: (position[tasks[t].node], tasks[t].local_rank))
