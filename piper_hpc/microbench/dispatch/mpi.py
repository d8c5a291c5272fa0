"""MPI_Alltoall and MPI_Alltoallv as a channel: the vendor's all-to-all under the permutations and sums of flat.

On the testbed MPICH takes all nodes for one host and goes through shared memory, past the shaped links: it needs
UCX_TLS=tcp,self and UCX_NET_DEVICES=eth0, and its rows are held against the counters of the links.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from piper_hpc.comm.channel import Work
from piper_hpc.runtime import mpi


class MpiChannel:
    """A channel over MPI's world, in the order of the job's ranks. Blocking; memory is the host's.

    Raises `piper_hpc.runtime.mpi.MpiError` as `piper_hpc.runtime.mpi.world` does.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._world, self._byte = mpi.world(ranks, rank), mpi.load().BYTE

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        """See `piper_hpc.comm.channel.Channel.all_to_all`. Counts, int64 of equal splits, go by MPI_Alltoall."""
        row_bytes = source.element_size() * prod(source.shape[1:])
        send, recv = self._bytes(source, send_rows, row_bytes), self._bytes(output, recv_rows, row_bytes)
        if source.dtype == torch.int64 and set(send_rows) | set(recv_rows) == {1}:
            self._world.Alltoall([send[0], row_bytes, self._byte], [recv[0], row_bytes, self._byte])
        else:
            self._world.Alltoallv([*send, self._byte], [*recv, self._byte])
        return self

    def wait(self) -> None:
        """Alltoall and Alltoallv return when they are done."""

    @staticmethod
    def _bytes(tensor: torch.Tensor, rows: Sequence[int], row_bytes: int) -> tuple[Any, list[int]]:
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8).numpy(), [0] * len(rows)
        return tensor.view(-1).view(torch.uint8).numpy(), [count * row_bytes for count in rows]
