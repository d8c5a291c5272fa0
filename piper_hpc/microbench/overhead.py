"""Overhead of messages: what a rank that sends and receives loses of its computing (o of LogP, Culler et al. 1993).

Copies, wake-ups and the network's own work take cores (or a device's multiprocessors) from a rank whose messages it
does not wait for. A pipeline has two such ends of messages beside nearly every action; a message timed alone shows its
latency only. Rows and curves are named `overhead/tier`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.microbench.exchanges import message_value, wrong_values
from piper_hpc.microbench.timing import MAX_SAMPLES, Call, Team, Timing

COMPUTE_PER_MESSAGE = 3
"""Compute lasts so many times the exchange that goes on beside it, which is then over before anybody waits for it."""
CYCLE_S = 0.03
"""Compute beside a message lasts at least so long: ranks are late by a period of their quota, 10 ms, or two."""
CYCLES = 3
"""Messages of a sample."""
SAMPLES = 4
"""At least so many pairs of a sample with messages and one without."""

Post = Callable[[], Sequence[dist.Work]]
"""Starts a send and a receive, and does not wait; nothing on a rank that takes no part."""


def neighbour_exchange(peer: int | None, elements: int, device: torch.device, dtype: torch.dtype) -> tuple[Post, int]:
    """A message of `elements` values to `peer` and one from it, both under way at once, and how many wrong values the
    first brought; without a peer, nothing."""
    if peer is None:
        return list, 0
    rank = dist.get_rank()
    sent = torch.full((elements,), message_value(rank, peer), device=device, dtype=dtype)
    # Two are under way at once.
    received = [torch.empty_like(sent) for _ in range(2)]

    def post() -> Sequence[dist.Work]:
        received.reverse()
        operations = [dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received[0], peer)]
        works: Sequence[dist.Work] = dist.batch_isend_irecv(operations)
        return works

    _wait(post())
    return post, wrong_values(received[0], message_value(peer, rank))


def time_overhead(work: Call, work_s: float, post: Post, team: Team, share_s: float) -> Timing:
    """Seconds that a rank which computes loses to one message sent and one received beside it, by rank and sample.

    work: a small piece of compute of about work_s seconds, the same on all ranks. A sample is the time of CYCLES cycles
    of compute with messages less that of as many without, in turn; noise may take it below zero. Each cycle's messages
    are waited for after the next one's compute, so that nobody waits for a rank that is late by less than a cycle.
    """
    exchange_s, share_s = team.maximum(_exchange_s(post, team), share_s)
    cycle_s = max(CYCLE_S, COMPUTE_PER_MESSAGE * exchange_s)
    calls = math.ceil(cycle_s / work_s)
    count = min(MAX_SAMPLES, max(SAMPLES, int(share_s / (2 * CYCLES * cycle_s))))

    def sample(number: int) -> float:
        # What comes second finds a quota as the first left it: turns are taken.
        order = (post, list) if number % 2 else (list, post)
        seconds = {each: _cycles_s(calls, work, each, team) for each in order}
        return (seconds[post] - seconds[list]) / CYCLES

    return Timing(team.table([sample(number) for number in range(count)]), CYCLES)


def _exchange_s(post: Post, team: Team) -> float:
    """Median seconds of one exchange by itself."""
    seconds = []
    for _ in range(5):
        team.barrier()
        start = perf_counter()
        _wait(post())
        team.wait_for_device()
        seconds.append(perf_counter() - start)
    return float(np.median(seconds))


def _cycles_s(calls: int, work: Call, post: Post, team: Team) -> float:
    """Seconds of CYCLES times `calls` calls of work, with what `post` starts beside them."""
    team.barrier()
    start, under_way = perf_counter(), post()
    for cycle in range(CYCLES):
        for _ in range(calls):
            work()
        following = post() if cycle + 1 < CYCLES else []
        _wait(under_way)
        under_way = following
    team.wait_for_device()
    return perf_counter() - start


def _wait(works: Sequence[dist.Work]) -> None:
    for each in works:
        each.wait()
