"""Which rank this process is: read from the scheduler's environment, never from the host's name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnvironment:
    """One process of a job as the scheduler started it: rank, node, switches, job and step.

    rank: as torch counts; it is the scheduler's number of the task, `task`, unless ranks are placed by the topology.
    switches: those above the node, from far to near, as far as the scheduler tells. attempt: of the run, as
    the record numbers it; before a rank has joined the run, Slurm's count of requeues.
    """

    rank: int
    ranks: int
    local_rank: int
    node: str
    switches: tuple[str, ...]
    job_id: str
    step_id: str
    attempt: int
    master_address: str
    task: int

    @property
    def rack(self) -> str:
        """The switch next above the node; empty where it is not known."""
        return self.switches[-1] if self.switches else ""

    @property
    def rendezvous_id(self) -> str:
        """A name that only the ranks of this attempt share, `job.step.attempt`; torchrun calls it the rdzv id."""
        return f"{self.job_id}.{self.step_id}.{self.attempt}"

    @staticmethod
    def read(environ: Mapping[str, str] = os.environ) -> RankEnvironment:
        """From `local_variables`, or else from those of a Slurm step.

        Raises RuntimeError where neither is set: a silent world of one would train the wrong thing.
        """
        if "PIPER_LOCAL_RANK" in environ:  # also inside an allocation of Slurm's
            rank = int(environ["PIPER_LOCAL_RANK"])
            return RankEnvironment(
                rank=rank,
                ranks=int(environ["PIPER_LOCAL_RANKS"]),
                local_rank=rank,
                node="localhost",
                switches=(),
                job_id=environ["PIPER_LOCAL_JOB"],
                step_id="0",
                attempt=0,
                master_address="127.0.0.1",
                task=rank,
            )
        if "SLURM_PROCID" in environ:
            node = environ["SLURMD_NODENAME"]
            return RankEnvironment(
                rank=int(environ["SLURM_PROCID"]),
                ranks=int(environ["SLURM_NTASKS"]),
                local_rank=int(environ["SLURM_LOCALID"]),
                node=node,
                switches=_switches(environ),
                job_id=environ["SLURM_JOB_ID"],
                step_id=environ.get("SLURM_STEP_ID", "0"),
                attempt=int(environ.get("SLURM_RESTART_COUNT", "0")),
                master_address=_required(environ, "MASTER_ADDR"),
                task=int(environ["SLURM_PROCID"]),
            )
        raise RuntimeError("no rank in the environment: start workers with srun or through piper_hpc.launch")


def local_variables(rank: int, ranks: int, job_id: str) -> dict[str, str]:
    """What tells a process that it is a rank of this machine alone."""
    return {"PIPER_LOCAL_RANK": str(rank), "PIPER_LOCAL_RANKS": str(ranks), "PIPER_LOCAL_JOB": job_id}


def _switches(environ: Mapping[str, str]) -> tuple[str, ...]:
    """From SLURM_TOPOLOGY_ADDR, for example spine.sw1.n1; its pattern, switch.switch.node, counts a node's own dots."""
    address = environ.get("SLURM_TOPOLOGY_ADDR", "")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    above = kinds.index("node") if "node" in kinds else address.count(".")
    return tuple(address.split(".")[:above])


def _required(environ: Mapping[str, str], key: str) -> str:
    if not environ.get(key):
        raise RuntimeError(f"{key} is not set: the batch script exports it (see sbatch_templates/)")
    return environ[key]
