"""The same exchanges by MPI, the vendor's reference: Alltoallv, Allreduce, Reduce_scatter_block, Allgather, Send."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.microbench.exchanges import (
    Exchange,
    message_value,
    message_values,
    no_exchange,
    reduction_input,
    reduction_result,
    wrong_values,
)
from piper_hpc.microbench.groups import GroupFamily
from piper_hpc.runtime import mpi

SUMMED = {torch.float32: "FLOAT", torch.float64: "DOUBLE"}
"""Types that MPI can add, by their names in MPI; others it can only move."""


@dataclass(frozen=True)
class MpiBackend:
    """Exchanges of MPI among the ranks of the default process group.

    Tensors on a device are handed over as they are, which needs an MPI that knows devices.
    """

    device: torch.device
    dtype: torch.dtype
    world: Any
    name: str = "mpi"

    @staticmethod
    def start(device: torch.device, dtype: torch.dtype) -> MpiBackend:
        """On this rank of the job. Raises mpi.MpiError where MPI cannot be used."""
        return MpiBackend(device, dtype, mpi.world(dist.get_world_size(), dist.get_rank()))

    @property
    def library(self) -> str:
        """Name and version of the MPI library."""
        return mpi.library()

    def round_trip(self, pair: tuple[int, int], elements: int) -> Exchange:
        """A message from the first rank of `pair` to the second and back: MPI_Send and MPI_Recv."""
        rank = dist.get_rank()
        peer = pair[1] if rank == pair[0] else pair[0]
        sent = torch.full((elements,), message_value(rank, peer), device=self.device, dtype=self.dtype)
        received = torch.empty_like(sent)
        outgoing, incoming = self._bytes(sent), self._bytes(received)

        def call() -> None:
            if rank == pair[0]:
                self.world.Send(outgoing, peer)
                self.world.Recv(incoming, peer)
            else:
                self.world.Recv(incoming, peer)
                self.world.Send(outgoing, peer)

        call()
        return call, wrong_values(received, message_value(peer, rank))

    @contextmanager
    def collectives(self, family: GroupFamily) -> Iterator[Callable[[str, int], Exchange]]:
        """A builder (name, elements) -> exchange among this rank's group of the family.

        The group is freed in good order alone: MPI_Comm_free is collective, and after an error of one rank it might
        wait for others that never come. The error then ends the rank, and MPI with it.
        """
        rank = dist.get_rank()
        members = next((group for group in family.groups if rank in group), None)
        group = self.world.Split(family.groups.index(members) if members else len(family.groups), rank)

        def build(name: str, elements: int) -> Exchange:
            return no_exchange() if members is None else _BUILDERS[name](self, group, members, elements)

        yield build
        group.Free()

    def all_to_all(self, group: Any, members: Sequence[int], elements: int) -> Exchange:
        """MPI_Alltoallv with equal parts, as torch's `all_to_all_single`."""
        rank, part = dist.get_rank(), elements // len(members)
        sent = message_values([message_value(rank, peer) for peer in members], part, self.device, self.dtype)
        received = torch.empty_like(sent)
        counts = [part * sent.element_size()] * len(members)
        outgoing, incoming = [self._bytes(sent), counts], [self._bytes(received), counts]

        def call() -> None:
            group.Alltoallv(outgoing, incoming)

        call()
        expected = message_values([message_value(peer, rank) for peer in members], part, self.device, self.dtype)
        return call, wrong_values(received, expected)

    def all_reduce(self, group: Any, members: Sequence[int], elements: int) -> Exchange:
        """MPI_Allreduce, out of place."""
        sent = reduction_input(list(members).index(dist.get_rank()), len(members), elements, self.device, self.dtype)
        received = torch.empty_like(sent)
        outgoing, incoming = self._numbers(sent), self._numbers(received)

        def call() -> None:
            group.Allreduce(outgoing, incoming)

        call()
        return call, wrong_values(received, reduction_result(elements, self.device, self.dtype))

    def reduce_scatter(self, group: Any, members: Sequence[int], elements: int) -> Exchange:
        """MPI_Reduce_scatter_block."""
        part, place = elements // len(members), list(members).index(dist.get_rank())
        sent = reduction_input(place, len(members), part * len(members), self.device, self.dtype)
        received = torch.empty(part, device=self.device, dtype=self.dtype)
        outgoing, incoming = self._numbers(sent), self._numbers(received)

        def call() -> None:
            group.Reduce_scatter_block(outgoing, incoming)

        call()
        expected = reduction_result(part * len(members), self.device, self.dtype).chunk(len(members))[place]
        return call, wrong_values(received, expected)

    def all_gather(self, group: Any, members: Sequence[int], elements: int) -> Exchange:
        """MPI_Allgather."""
        part = elements // len(members)
        sent = torch.full((part,), message_value(dist.get_rank(), 0), device=self.device, dtype=self.dtype)
        received = torch.empty(part * len(members), device=self.device, dtype=self.dtype)
        outgoing, incoming = self._bytes(sent), self._bytes(received)

        def call() -> None:
            group.Allgather(outgoing, incoming)

        call()
        return call, wrong_values(
            received, message_values([message_value(peer, 0) for peer in members], part, self.device, self.dtype)
        )

    def _bytes(self, tensor: torch.Tensor) -> Any:
        """The tensor's memory, to be moved: MPI knows no bfloat16."""
        return self._memory(tensor.view(torch.uint8))

    def _numbers(self, tensor: torch.Tensor) -> Any:
        """The tensor's numbers, to be added."""
        if tensor.dtype not in SUMMED:
            raise mpi.MpiError(f"MPI cannot add {tensor.dtype}: use train.dtype=float32 with task.backend=mpi")
        return [self._memory(tensor), getattr(mpi.load(), SUMMED[tensor.dtype])]

    def _memory(self, tensor: torch.Tensor) -> Any:
        return tensor.numpy() if self.device.type == "cpu" else tensor


_BUILDERS: dict[str, Callable[[MpiBackend, Any, Sequence[int], int], Exchange]] = {
    "all_to_all": MpiBackend.all_to_all,
    "all_reduce": MpiBackend.all_reduce,
    "reduce_scatter": MpiBackend.reduce_scatter,
    "all_gather": MpiBackend.all_gather,
}
