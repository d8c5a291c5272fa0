"""The network of a job, watched from before its task to the end: for the record."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from piper_hpc.runtime import network
from piper_hpc.spec.fabric import Fabric, Traffic, crossed, fallbacks, of_all_nodes
from piper_hpc.tasks.context import Context


@dataclass(frozen=True)
class NetworkWatch:
    """Counters of this node as they were, on one rank of each node of a job that has several; else None."""

    context: Context
    before: Sequence[Traffic] | None

    @staticmethod
    def start(context: Context) -> NetworkWatch:
        """Read the counters once."""
        watches = context.rank_env.local_rank == 0 and len(set(context.nodes)) > 1
        return NetworkWatch(context, network.counters() if watches else None)

    def record(self) -> dict[str, Any]:
        """`network` of the manifest: read once more, and what all nodes found. Collective."""
        nodes = len(set(self.context.nodes))
        if nodes == 1:
            return document(None, {}, {}, nodes)
        found: list[Any] = [None] * self.context.rank_env.ranks
        mine = None
        if self.before is not None:
            gained = crossed(self.before, network.counters())
            mine = self.context.rank_env.node, self._said(), gained
        dist.all_gather_object(found, mine)
        of_nodes = [each for each in found if each is not None]
        said = {node: fabric for node, fabric, _ in of_nodes}
        traffic = {node: its for node, _, its in of_nodes}
        return document(self.context.experiment.cluster.fabric, said, traffic, nodes)

    def _said(self) -> Fabric | None:
        rank_env, task = self.context.rank_env, self.context.experiment.task
        if task.name == "microbench" and task.backend == "mpi":
            return None  # MPI says nothing, and gloo carries no more than the rendezvous
        if self.context.device.type == "cpu":
            named = os.environ.get("GLOO_SOCKET_IFNAME", "")
            return Fabric("gloo", interfaces=tuple(filter(None, named.split(","))))
        return network.said_in(self.context.run.log(rank_env.attempt, rank_env.task))


def document(
    expected: str | None,
    said: Mapping[str, Fabric | None],
    traffic: Mapping[str, Sequence[Traffic]],
    nodes: int,
) -> dict[str, Any]:
    """What the record keeps. said, traffic: of every node, by its name; empty where there is one node alone."""
    libraries = Counter(fabric for fabric in said.values() if fabric is not None)
    sums = of_all_nodes(traffic.values())
    return {
        "nodes": nodes,
        "expected": expected,
        "libraries": [asdict(fabric) | {"nodes": count} for fabric, count in libraries.items()],
        "interfaces": [asdict(each) for each in sums if each.sent_bytes or each.received_bytes],
        "fallbacks": fallbacks(expected, said, traffic),
    }
