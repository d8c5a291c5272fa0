"""One rank of `make bench-a2a`: `python -m piper_hpc.studies.all_to_all.rank TASK.json`, started by srun.

The task names the run, what its rows have beside, the parts to measure one after the other, and whether MPI takes part.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from piper_hpc.runtime import mpi

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

    def write(self, path: Path) -> None:
        """For `read`."""
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Task:
        """What `write` left."""
        document = json.loads(path.read_text())
        return Task(**document | {"parts": [Part(**part) for part in document["parts"]]})


def main() -> int:
    """Measure; rank 0 adds the rows to the run."""
    task = Task.read(Path(sys.argv[1]))
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
    from piper_hpc.microbench.links import counter_of
    from piper_hpc.runs import RunFolder
    from piper_hpc.runtime.group import process_group
    from piper_hpc.runtime.rank import RankEnvironment

    run, place, device = RunFolder(task.run), RankEnvironment.read(), torch.device("cpu")
    torch.set_num_threads(1)
    # Each machine's Slurm counts its jobs from 1: ranks of one must not find the address of the one before.
    meeting = run.path / f"meeting-{Path(sys.argv[1]).stem}"
    with process_group(place, meeting, device, TIMEOUT_S):
        found: list[Any] = [None] * place.ranks
        dist.all_gather_object(found, (place.node, place.rack))
        places = Places(tuple(node for node, _ in found), tuple(rack for _, rack in found))
        factory = DispatcherFactory(places, range(place.ranks), timedelta(seconds=TIMEOUT_S))
        others: dict[str, Channel] = {}
        extra = task.extra | {"nodes": list(dict.fromkeys(places.node_of_rank)), "ranks": list(range(place.ranks))}
        if task.mpi:
            others["mpi"], extra["mpi"] = MpiChannel(place.rank, place.ranks), mpi.library()
        counter = counter_of("auto", device.type)
        for part in task.parts:
            variants, cells = [Variant(**each) for each in part.variants], [Cell(**each) for each in part.cells]
            counted = counter.sent_bytes if counter else None
            bench = Bench(variants, [factory], device, others=others, link_bytes=counted, extra=extra)
            time_cells(bench, cells, iterations=part.iterations, budget_s=part.budget_s, on_row=run.append_measurement)
    return 0


if __name__ == "__main__":
    sys.exit(main())
