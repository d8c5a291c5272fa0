"""MPI_Alltoall and MPI_Alltoallv as a channel: the vendor's exchange under the same permutations and sums as flat's.

On the testbed MPICH takes all nodes for one host and goes through shared memory, past the shaped links: it needs
UCX_TLS=tcp,self and UCX_NET_DEVICES=eth0, and its rows are held against the counters of the links.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from piper_hpc.comm.channel import Pending


class MpiError(RuntimeError):
    """MPI is not there, or its world is not the job's."""


class MpiChannel:
    """A channel over MPI_COMM_WORLD, whose ranks are the job's. Blocking; memory is the host's.

    Raises MpiError without mpi4py and an MPI library, and where MPI sees another number of ranks: then the job was not
    started for MPI (srun --mpi=pmi2). mpi4py is imported before torch where a site's MPI asks for that.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise MpiError(f"mpi4py or its MPI library is missing ({error}): pip install mpi4py mpich") from None
        world = MPI.COMM_WORLD
        if (world.Get_rank(), world.Get_size()) != (rank, ranks):
            raise MpiError(
                f"MPI counts rank {world.Get_rank()} of {world.Get_size()}, the job rank {rank} of {ranks}: "
                "start it with srun --mpi=pmi2"
            )
        self._mpi, self._world = MPI, world
        self.library = MPI.Get_library_version().splitlines()[0].strip()

    def exchange(
        self, output: torch.Tensor, source: torch.Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Pending:
        """See `piper_hpc.comm.channel.Channel.exchange`. Counts, int64 of equal splits, go by MPI_Alltoall."""
        row_bytes = source.element_size() * prod(source.shape[1:])
        sent, came = self._bytes(source, send, row_bytes), self._bytes(output, receive, row_bytes)
        if source.dtype == torch.int64 and set(send) | set(receive) == {1}:
            self._world.Alltoall([sent[0], row_bytes, self._mpi.BYTE], [came[0], row_bytes, self._mpi.BYTE])
        else:
            self._world.Alltoallv([*sent, self._mpi.BYTE], [*came, self._mpi.BYTE])
        return self

    def wait(self) -> None:
        """Nothing is under way."""

    @staticmethod
    def _bytes(tensor: torch.Tensor, rows: Sequence[int], row_bytes: int) -> tuple[Any, list[int]]:
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8).numpy(), [0] * len(rows)
        return tensor.view(-1).view(torch.uint8).numpy(), [count * row_bytes for count in rows]
