"""One rank that mpiexec starts, for test_mpi: `python -m tests.microbench.mpi_program FOLDER`; rank 0 prints JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from piper_hpc.runtime import mpi

MPI = mpi.load()  # before torch, as a job does

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from piper_hpc.comm.channel import GroupChannel  # noqa: E402
from piper_hpc.microbench.dispatch.mpi import MpiChannel  # noqa: E402
from piper_hpc.microbench.exchange_suite import SUITES, ExchangeSuite  # noqa: E402
from piper_hpc.microbench.mpi_exchanges import MpiBackend  # noqa: E402
from piper_hpc.microbench.rows import RowWriter  # noqa: E402
from piper_hpc.microbench.timing import Team  # noqa: E402
from piper_hpc.spec import Layout, RankMap  # noqa: E402

CPU = torch.device("cpu")


def suite() -> list[dict[str, Any]]:
    """Rows of every exchange by MPI, on two nodes of two ranks as the names go."""
    rows: list[dict[str, Any]] = []
    book = RowWriter(Team(CPU), RankMap.block(Layout(dp=4), 2, (0, 0)), torch.float32, rows.append, ("n0", "n1"))
    ExchangeSuite(book, MpiBackend.start(CPU, torch.float32), CPU, 0.05).run(SUITES)
    return rows


def channels_agree() -> bool:
    """Whether uneven rows arrive by MPI as they do by gloo, and so do counts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    rows = torch.tensor([[(3 * source + target) % 4 for target in range(ranks)] for source in range(ranks)])
    send, receive = rows[rank].tolist(), rows[:, rank].tolist()
    source = torch.arange(sum(send) * 5, dtype=torch.float64).view(-1, 5) + 1000 * rank
    counts = rows[rank].contiguous()
    arrived = []
    for channel in (MpiChannel(rank, ranks), GroupChannel(dist.group.WORLD, "test")):
        output, told = torch.empty(sum(receive), 5, dtype=torch.float64), torch.empty(ranks, dtype=torch.int64)
        channel.all_to_all(output, source, receive, send).wait()
        channel.all_to_all(told, counts, [1] * ranks, [1] * ranks).wait()
        arrived.append((output, told))
    return all(torch.equal(one, other) for one, other in zip(*arrived, strict=True))


def main() -> None:
    """Everything above, over a gloo group beside MPI's."""
    world = MPI.COMM_WORLD
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(Path(sys.argv[1]) / "store"), world.Get_size())
    dist.init_process_group("gloo", store=store, rank=world.Get_rank(), world_size=world.Get_size())
    torch.set_num_threads(1)
    agree: list[Any] = [None] * world.Get_size()
    dist.all_gather_object(agree, channels_agree())
    rows = suite()
    if dist.get_rank() == 0:
        print(json.dumps({"rows": rows, "agree": agree, "library": mpi.library()}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
