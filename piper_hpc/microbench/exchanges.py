"""Exchanges between ranks at one size, by torch.distributed, each checked on its first call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from piper_hpc.microbench.groups import GroupFamily
from piper_hpc.runtime.group import lower_gloo_receiver_priority

Exchange = tuple[Callable[[], object], int]
"""A call that is timed, and how many wrong values the first one delivered."""

BUS_FACTOR: dict[str, Callable[[int], float]] = {
    "p2p": lambda n: 1.0,
    "p2p_concurrent": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
}
"""Bus bandwidth over algorithm bandwidth for n ranks (nccl-tests, doc/PERFORMANCE.md).

The bytes of a row are those of the larger of a rank's two buffers: what is gathered, or what is reduced and scattered.
"""


def message_value(source: int, target: int) -> int:
    """A value that names a message and is exact in every floating-point type of 8 bits of precision and more."""
    return 1 + source % 15 * 16 + target % 16


def reduction_input(place: int, members: int, elements: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What member `place` of a group adds to a reduction, [elements]: 0 but at every members-th element, which has
    `reduction_result`'s value.

    However many members there are and in whatever order they are added up, each partial sum is 0 or a whole number of
    up to 8 bits, exact in every type; sums of ones are not, bfloat16 ends at 256. A member that is missed or added
    twice shows in its elements, and rows that went to the wrong member show in their values.
    """
    values = reduction_result(elements, device, dtype)
    mine = torch.arange(elements, device=device, dtype=torch.int32).remainder_(members).eq_(place)
    return values.mul_(mine)


def reduction_result(elements: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The sum of `reduction_input` over a group, [elements]: 1 to 251 over and over, a prime, so that parts differ."""
    return torch.arange(elements, device=device, dtype=torch.int32).remainder_(251).add_(1).to(dtype)


def no_exchange() -> Exchange:
    """The exchange of a rank that takes no part: a call that does nothing, and no wrong values."""
    return (lambda: None), 0


def wrong_values(received: torch.Tensor, expected: torch.Tensor | float) -> int:
    """How many values of `received` differ from `expected`: a tensor of the same shape, or one value for all."""
    return int((received != expected).sum())


def round_trip(pair: tuple[int, int], elements: int, device: torch.device, dtype: torch.dtype) -> Exchange:
    """A message from the first rank of `pair` to the second and back, called by these two: twice the one-way time."""
    first, second = pair
    rank = dist.get_rank()
    peer = second if rank == first else first
    sent = torch.full((elements,), message_value(rank, peer), device=device, dtype=dtype)
    received = torch.empty_like(sent)

    def call() -> None:
        if rank == first:
            dist.send(sent, peer)
            dist.recv(received, peer)
        else:
            dist.recv(received, peer)
            dist.send(sent, peer)

    call()
    return call, wrong_values(received, message_value(peer, rank))


def all_to_all(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """Equal parts of `elements` values to every member of the group, this rank included."""
    rank, part = dist.get_rank(), elements // len(members)
    sent = message_values([message_value(rank, peer) for peer in members], part, device, dtype)
    received = torch.empty_like(sent)

    def call() -> None:
        dist.all_to_all_single(received, sent, group=group)

    call()
    return call, wrong_values(
        received, message_values([message_value(peer, rank) for peer in members], part, device, dtype)
    )


def message_values(values: Sequence[int], part: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Each value `part` times, one after the other: [len(values) * part]."""
    return torch.tensor(values, device=device, dtype=dtype).repeat_interleave(part)


def all_reduce(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """The sum of `elements` values over the group, in place."""
    values = reduction_input(list(members).index(dist.get_rank()), len(members), elements, device, dtype)

    def call() -> None:
        dist.all_reduce(values, group=group)

    call()
    wrong = wrong_values(values, reduction_result(elements, device, dtype))
    values.zero_()  # sums of zeros stay zero, however often they are taken
    return call, wrong


def reduce_scatter(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """The sum over the group of each rank's part of `elements` values."""
    part, place = elements // len(members), list(members).index(dist.get_rank())
    sent = reduction_input(place, len(members), part * len(members), device, dtype)
    received = torch.empty(part, device=device, dtype=dtype)

    def call() -> None:
        dist.reduce_scatter_tensor(received, sent, group=group)

    call()
    return call, wrong_values(received, reduction_result(part * len(members), device, dtype).chunk(len(members))[place])


def all_gather(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """Every member's part, `elements` values in all, on every member."""
    part = elements // len(members)
    sent = torch.full((part,), message_value(dist.get_rank(), 0), device=device, dtype=dtype)
    received = torch.empty(part * len(members), device=device, dtype=dtype)

    def call() -> None:
        dist.all_gather_into_tensor(received, sent, group=group)

    call()
    return call, wrong_values(
        received, message_values([message_value(peer, 0) for peer in members], part, device, dtype)
    )


COLLECTIVES = {
    "all_to_all": all_to_all,
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
}


@contextmanager
def process_group(family: GroupFamily) -> Iterator[dist.ProcessGroup | None]:
    """This rank's group of the family (None: the default group, or no part in it); ended afterwards, also by an error.

    After an error no rank waits for the others: they may not come.
    """
    if family.size == dist.get_world_size():
        yield None
        return
    own = None
    for members in family.groups:
        group = dist.new_group(list(members))
        if dist.get_rank() in members:
            own = group
    lower_gloo_receiver_priority()
    try:
        yield own
        dist.barrier()
    finally:
        if own is not None:
            dist.destroy_process_group(own)


@dataclass(frozen=True)
class TorchBackend:
    """Exchanges of torch.distributed, over whatever back end the process group has: gloo, nccl (RCCL), xccl."""

    device: torch.device
    dtype: torch.dtype
    name: str = "torch"

    @property
    def library(self) -> str:
        """What carries the bytes."""
        return str(dist.get_backend())

    def round_trip(self, pair: tuple[int, int], elements: int) -> Exchange:
        """See `round_trip`."""
        return round_trip(pair, elements, self.device, self.dtype)

    @contextmanager
    def collectives(self, family: GroupFamily) -> Iterator[Callable[[str, int], Exchange]]:
        """A builder (name, elements) -> exchange among this rank's group of the family."""
        members = next((group for group in family.groups if dist.get_rank() in group), None)
        with process_group(family) as group:

            def build(name: str, elements: int) -> Exchange:
                if members is None:
                    return no_exchange()
                return COLLECTIVES[name](group, members, elements, self.device, self.dtype)

            yield build
