"""Exchanges between ranks at one size: point-to-point, all-to-all, all-reduce, each checked on its first call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

Exchange = tuple[Callable[[], object], bool]
"""A call that is timed, and whether the first one delivered the right values."""

BUS_FACTOR: dict[str, Callable[[int], float]] = {
    "p2p": lambda n: 1.0,
    "all_to_all": lambda n: (n - 1) / n,
    "all_reduce": lambda n: 2 * (n - 1) / n,
}
"""Bus bandwidth over algorithm bandwidth for n ranks, as nccl-tests defines it."""


def _label(source: int, target: int) -> int:
    """A value that names a message and is exact in every floating-point type of 8 bits of precision and more."""
    return 1 + source % 15 * 16 + target % 16


def round_trip(pair: tuple[int, int], elements: int, device: torch.device, dtype: torch.dtype) -> Exchange:
    """A message from the first rank of `pair` to the second and back, called by these two: twice the one-way time."""
    first, second = pair
    rank = dist.get_rank()
    peer = second if rank == first else first
    sent = torch.full((elements,), _label(rank, peer), device=device, dtype=dtype)
    received = torch.empty_like(sent)

    def call() -> None:
        if rank == first:
            dist.send(sent, peer)
            dist.recv(received, peer)
        else:
            dist.recv(received, peer)
            dist.send(sent, peer)

    call()
    return call, bool((received == _label(peer, rank)).all())


def all_to_all(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """Equal parts of `elements` values to every member of the group, this rank included."""
    rank, part = dist.get_rank(), elements // len(members)
    sent = torch.tensor([_label(rank, peer) for peer in members], device=device, dtype=dtype).repeat_interleave(part)
    expected = torch.tensor([_label(peer, rank) for peer in members], device=device, dtype=dtype)
    received = torch.empty_like(sent)

    def call() -> None:
        dist.all_to_all_single(received, sent, group=group)

    call()
    return call, torch.equal(received, expected.repeat_interleave(part))


def all_reduce(
    group: dist.ProcessGroup | None, members: Sequence[int], elements: int, device: torch.device, dtype: torch.dtype
) -> Exchange:
    """The sum of `elements` values over the group, in place."""
    values = torch.ones(elements, device=device, dtype=dtype)

    def call() -> None:
        dist.all_reduce(values, group=group)

    call()
    correct = bool((values == torch.tensor(len(members), device=device, dtype=dtype)).all())
    values.zero_()  # sums of zeros stay zero, however often they are taken
    return call, correct


COLLECTIVES = {"all_to_all": all_to_all, "all_reduce": all_reduce}
