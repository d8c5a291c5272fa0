"""One rank of a stage of `make bench-a2a`, whose job `submit` starts.

The task in the stage's folder names the run, what its rows have beside, the parts to measure one after the other, and
whether MPI takes part.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from piper_hpc.runs import RunFolder, Status
from piper_hpc.runtime import mpi
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.submit.payload import run_as_rank

TASK = "task.json"
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Part:
    """Cells measured with the same variants, in `budget_s` seconds: fields of `Cell` and of `Variant`."""

    cells: list[dict[str, Any]]
    variants: list[dict[str, Any]]
    iterations: int
    budget_s: float


@dataclass(frozen=True)
class Task:
    """What all ranks are given. mpi: whether MPI_COMM_WORLD is there to make a channel of."""

    run: str
    extra: dict[str, Any]
    parts: list[Part]
    mpi: bool

    def write(self, folder: Path) -> None:
        """For `read`."""
        (folder / TASK).write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> Task:
        """What `write` left."""
        document = json.loads((folder / TASK).read_text())
        return Task(**document | {"parts": [Part(**part) for part in document["parts"]]})


def work(stage_path: str) -> None:
    """Measure the stage whose job's folder is `stage_path`."""
    run_as_rank(RunFolder(stage_path), _measure)


def _measure(stage: RunFolder, rank_env: RankEnvironment) -> None:
    """Rank 0 adds the rows to the study's run, and says in the stage's folder how far it came."""
    task = Task.read(stage.path)
    if task.mpi:
        # Before torch: MPICH on Cray systems chooses its network cards while it is loaded.
        mpi.load()

    import torch
    import torch.distributed as dist

    from piper_hpc.comm.channel import Channel
    from piper_hpc.comm.factory import DispatcherFactory
    from piper_hpc.comm.hierarchy import Places
    from piper_hpc.microbench.dispatch.cells import Cell, Variant
    from piper_hpc.microbench.dispatch.mpi import MpiChannel
    from piper_hpc.microbench.dispatch.timing import Bench, time_cells
    from piper_hpc.microbench.links import link_counter
    from piper_hpc.runtime.group import process_group

    run, device = RunFolder(task.run), torch.device("cpu")
    torch.set_num_threads(1)
    with process_group(rank_env, stage.path / "rendezvous", device, TIMEOUT_S):
        if rank_env.rank == 0:
            stage.write_status(Status("running", rank_env.attempt))
        found: list[Any] = [None] * rank_env.ranks
        dist.all_gather_object(found, (rank_env.node, rank_env.rack))
        places = Places(tuple(node for node, _ in found), tuple(rack for _, rack in found))
        factory = DispatcherFactory(places, range(rank_env.ranks), timedelta(seconds=TIMEOUT_S))
        others: dict[str, Channel] = {}
        extra = task.extra | {"nodes": list(dict.fromkeys(places.node_of_rank)), "ranks": list(range(rank_env.ranks))}
        if task.mpi:
            others["mpi"], extra["mpi"] = MpiChannel(rank_env.rank, rank_env.ranks), mpi.library()
        counter = link_counter("auto", device.type)
        for part in task.parts:
            variants, cells = [Variant(**each) for each in part.variants], [Cell(**each) for each in part.cells]
            counted = counter.sent_bytes if counter else None
            bench = Bench(variants, [factory], device, others=others, link_bytes=counted, extra=extra)
            time_cells(bench, cells, iterations=part.iterations, budget_s=part.budget_s, on_row=run.append_measurement)
    # Only now nothing of this rank can fail any more.
    if rank_env.rank == 0:
        stage.write_status(Status("completed", rank_env.attempt))
