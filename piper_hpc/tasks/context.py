"""What a task is given: the configuration, the run, this rank's place and device, and where every rank stands."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.cluster.machine import Machine
from piper_hpc.config import Experiment
from piper_hpc.runs import RunFolder
from piper_hpc.runs.manifest import environment, versions
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.spec import Layout, RankMap


@dataclass(frozen=True)
class Context:
    """One rank's view of the job. `nodes` and `racks` are names, by rank."""

    experiment: Experiment
    run: RunFolder
    place: RankEnvironment
    device: torch.device
    nodes: tuple[str, ...]
    racks: tuple[str, ...]

    @staticmethod
    def gather(experiment: Experiment, run: RunFolder, place: RankEnvironment, device: torch.device) -> Context:
        """Learn from all ranks where they are; every rank of the job calls this once."""
        if device.type == "cpu":
            torch.set_num_threads(experiment.cluster.cpus_per_task)
        found: list[Any] = [None] * place.ranks
        dist.all_gather_object(found, (place.node, place.rack))
        return Context(experiment, run, place, device, tuple(n for n, _ in found), tuple(r for _, r in found))

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes the record."""
        return self.place.rank == 0

    @cached_property
    def machine(self) -> Machine:
        """What the launcher knew of the cluster."""
        facts = self.run.manifest()["machine"]
        return Machine(**facts | {"rack_of_node": tuple(facts["rack_of_node"])})

    def facts(self) -> dict[str, Any]:
        """What only the job itself knows of where it runs, for the manifest."""
        return {
            "attempt": self.place.attempt,
            "id": self.place.job_id,
            "nodes": list(dict.fromkeys(self.nodes)),
            "node_of_rank": list(self.nodes),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            "torch_threads": torch.get_num_threads(),
            "versions": versions(),
            "environment": environment(),
        }

    def rank_map(self, layout: Layout) -> RankMap:
        """The layout on the nodes that were granted; racks as Slurm says, else as configured."""
        names = list(dict.fromkeys(self.nodes))
        if any(self.racks):
            rack_names = list(dict.fromkeys(self.racks))
            racks = tuple(rack_names.index(self.racks[self.nodes.index(name)]) for name in names)
        else:
            racks = self.machine.rack_of_node
        return RankMap(layout, tuple(names.index(node) for node in self.nodes), racks)
