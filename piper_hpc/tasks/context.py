"""The context of a task: configuration, run folder, this rank's environment and device, placement of all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.cluster.machine import Machine
from piper_hpc.cluster.placement import nodes_of, switch_paths_of_nodes
from piper_hpc.config import Experiment
from piper_hpc.runs import RunFolder
from piper_hpc.runs.manifest import environment, versions
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.spec import DATA_SHEET, Calibration, Layout, RankMap


@dataclass(frozen=True)
class Context:
    """One rank's view of the job. rank_envs: of all ranks, in rank order."""

    experiment: Experiment
    run: RunFolder
    rank_env: RankEnvironment
    device: torch.device
    rank_envs: tuple[RankEnvironment, ...]

    @staticmethod
    def gather(experiment: Experiment, run: RunFolder, rank_env: RankEnvironment, device: torch.device) -> Context:
        """All-gather the environments of all ranks; every rank of the job calls this once."""
        if device.type == "cpu":
            torch.set_num_threads(experiment.cluster.cpus_per_task)
        found: list[Any] = [None] * rank_env.ranks
        dist.all_gather_object(found, rank_env)
        return Context(experiment, run, rank_env, device, tuple(found))

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes the record."""
        return self.rank_env.rank == 0

    @cached_property
    def machine(self) -> Machine:
        """What the launcher knew of the cluster."""
        facts = self.run.manifest()["machine"]
        return Machine(**facts | {key: tuple(facts[key]) for key in ("rack_of_node", "granted")})

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """The node of every rank, by name."""
        return tuple(rank_env.node for rank_env in self.rank_envs)

    @cached_property
    def granted(self) -> Machine:
        """The cluster with the leaf switches of the nodes that Slurm allocated; predictions of the run use it."""
        paths = list(self.paths[0].values())
        leaves = list(dict.fromkeys(paths))
        return replace(self.machine, granted=tuple(leaves.index(path) for path in paths))

    @property
    def topology_as_assumed(self) -> bool:
        """Whether the allocated nodes have the topology (racks, switches) that was assumed before the job started."""
        calibration, cluster = Calibration(DATA_SHEET, "", 1.0), self.experiment.cluster
        assumed, granted = (machine.spec(cluster, calibration) for machine in (self.machine, self.granted))
        if granted.topology is not None:
            return granted.topology == assumed.topology
        # Numbers of racks may differ where the racks do not.
        return [granted.rack_of_node.index(rack) for rack in granted.rack_of_node] == [
            assumed.rack_of_node.index(rack) for rack in assumed.rack_of_node
        ]

    @property
    def granted_note(self) -> str:
        """What a prediction says of the nodes that it rests on."""
        paths, source = self.paths
        leaves = list(dict.fromkeys(paths.values()))
        numbers = ", ".join(str(leaves.index(path)) for path in paths.values())
        return f"granted: {len(paths)} nodes below {len(leaves)} leaf switches, in rank order {numbers} (from {source})"

    @cached_property
    def paths(self) -> tuple[dict[str, tuple[str, ...]], str]:
        """Node -> names of the switches above it, far to near, nodes in rank order; and where they are known from."""
        nodes = nodes_of(sorted(self.rank_envs, key=lambda rank_env: rank_env.task))
        switches = [rank_env.switches for rank_env in nodes.values()]
        known, source = switch_paths_of_nodes(self.experiment.cluster, list(nodes), switches)
        by_node = dict(zip(nodes, known, strict=True))
        return {node: by_node[node] for node in dict.fromkeys(self.nodes)}, source

    def facts(self) -> dict[str, Any]:
        """What only the job itself knows of where it runs, for the manifest."""
        return {
            "attempt": self.rank_env.attempt,
            "id": self.rank_env.job_id,
            "nodes": list(dict.fromkeys(self.nodes)),
            "node_of_rank": list(self.nodes),
            "task_of_rank": [rank_env.task for rank_env in self.rank_envs],  # logs are named after tasks
            "granted": self._granted_facts(),
            "device": self._device_name,
            "torch_threads": torch.get_num_threads(),
            "versions": versions(),
            "environment": environment(),
        }

    def rank_map(self, layout: Layout) -> RankMap:
        """The layout on the nodes that were granted, with their leaf switches as racks."""
        names = list(dict.fromkeys(self.nodes))
        topology = self.experiment.cluster.topology
        per_nic = 1
        if topology is not None and topology.nics_per_node:
            per_nic = max(1, self.experiment.cluster.ranks_per_node // topology.nics_per_node)
        return RankMap(layout, tuple(names.index(node) for node in self.nodes), self.granted.granted, per_nic)

    @property
    def _device_name(self) -> str:
        kind = self.device.type
        return kind if kind == "cpu" else str(torch.get_device_module(self.device).get_device_name(self.device))

    def _granted_facts(self) -> dict[str, Any]:
        paths, source = self.paths
        return {
            "switches": {node: list(path) for node, path in paths.items()},
            "leaf_switches": len(set(paths.values())),
            "known_from": source,
        }
