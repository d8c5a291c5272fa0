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
from piper_hpc.runtime import mpi


class MpiChannel:
    """A channel over MPI's world, in the order of the job's ranks. Blocking; memory is the host's.

    Raises `piper_hpc.runtime.mpi.MpiError` as `piper_hpc.runtime.mpi.world` does.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        self._world, self._byte = mpi.world(ranks, rank), mpi.load().BYTE

    def exchange(
        self, output: torch.Tensor, source: torch.Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Pending:
        """See `piper_hpc.comm.channel.Channel.exchange`. Counts, int64 of equal splits, go by MPI_Alltoall."""
        row_bytes = source.element_size() * prod(source.shape[1:])
        sent, came = self._bytes(source, send, row_bytes), self._bytes(output, receive, row_bytes)
        if source.dtype == torch.int64 and set(send) | set(receive) == {1}:
            self._world.Alltoall([sent[0], row_bytes, self._byte], [came[0], row_bytes, self._byte])
        else:
            self._world.Alltoallv([*sent, self._byte], [*came, self._byte])
        return self

    def wait(self) -> None:
        """Nothing is under way."""

    @staticmethod
    def _bytes(tensor: torch.Tensor, rows: Sequence[int], row_bytes: int) -> tuple[Any, list[int]]:
        if not tensor.numel():
            return torch.empty(0, dtype=torch.uint8).numpy(), [0] * len(rows)
        return tensor.view(-1).view(torch.uint8).numpy(), [count * row_bytes for count in rows]
