"""Message times between all pairs of nodes, from which switch domains are derived where no scheduler knows them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

MESSAGE_BYTES = 2**20
REPEATS = 5


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Every pair of nodes once, in rounds in which each node has at most one partner (round robin, circle method).

    Pairs of a round send at once, so that those which share a switch's uplink are slower than those which do not.
    """
    seats = list(range(nodes + nodes % 2))
    found = []
    for _ in range(len(seats) - 1):
        pairs = [(seats[place], seats[-1 - place]) for place in range(len(seats) // 2)]
        found.append([(min(pair), max(pair)) for pair in pairs if max(pair) < nodes])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def time_pairs(node_of_rank: Sequence[str], device: torch.device) -> npt.NDArray[np.float64]:
    """Median seconds of a message of MESSAGE_BYTES between the first ranks of every two nodes, [nodes, nodes].

    node_of_rank: by rank of the default group, all of whose ranks call this and are given the same answer. Nodes count
    in the order in which they first appear.
    """
    names = list(dict.fromkeys(node_of_rank))
    leaders = [node_of_rank.index(name) for name in names]
    rank = dist.get_rank()
    mine = leaders.index(rank) if rank in leaders else None
    message = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8, device=device)
    measured: dict[tuple[int, int], float] = {}
    for pairs in rounds(len(names)):
        dist.barrier()
        for pair in pairs:
            if mine in pair:
                partner = leaders[pair[1] if mine == pair[0] else pair[0]]
                measured[pair] = _round_trip(message, partner, first=mine == pair[0]) / 2
    everyone: list[dict[tuple[int, int], float]] = [{} for _ in node_of_rank]
    dist.all_gather_object(everyone, measured)
    seconds = np.zeros((len(names), len(names)))
    for told in everyone:
        for (low, high), value in told.items():
            seconds[low, high] = seconds[high, low] = max(value, seconds[low, high])
    return seconds


def _round_trip(message: torch.Tensor, partner: int, *, first: bool) -> float:
    taken = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        for sends in (first, not first):
            (dist.send if sends else dist.recv)(message, partner)
        if message.device.type != "cpu":
            torch.accelerator.synchronize(message.device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])
