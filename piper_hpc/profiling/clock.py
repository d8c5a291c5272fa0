"""Clocks of one device, and how clocks of different nodes are brought onto one scale."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from piper_hpc.profiling.offset import ClockOffset

Mark = Any
"""A moment on a device: seconds on a CPU, an event on a GPU until it is resolved."""


class Clock(Protocol):
    """Marks moments cheaply during a step; turns them into seconds of this host's monotonic clock afterwards."""

    def start(self) -> None:
        """Begin a step."""

    def now(self) -> Mark:
        """Mark this moment in the device's order of work."""

    def finish(self) -> None:
        """End a step: from here on every mark can be resolved."""

    def seconds(self, mark: Mark) -> float:
        """Seconds of the host's monotonic clock at `mark`."""


class CpuClock:
    """Work is done when the call returns, so the host's clock is the device's clock."""

    now = staticmethod(time.monotonic)

    def start(self) -> None:
        """Begin a step."""

    def finish(self) -> None:
        """End a step."""

    def seconds(self, mark: Mark) -> float:
        """A mark is already in seconds."""
        return float(mark)


class ProcessClock(CpuClock):
    """CPU seconds of all threads of this process in place of time; as no other rank shares it, waits mean nothing."""

    now = staticmethod(time.process_time)


class EventClock:
    """Events on the current stream, resolved after the step; it synchronises only between steps."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._torch = device, torch.get_device_module(device)
        self._pool: list[Any] = []
        self._used = 0
        self._origin = self._torch.Event(enable_timing=True)
        self._origin_s = 0.0

    def start(self) -> None:
        """Tie one event to the host's clock."""
        self._used = 0
        self._origin.record(self._torch.current_stream(self._device))
        self._origin.synchronize()
        self._origin_s = time.monotonic()

    def now(self) -> Mark:
        """Record the next event of the pool."""
        if self._used == len(self._pool):
            self._pool.append(self._torch.Event(enable_timing=True))
        event = self._pool[self._used]
        self._used += 1
        event.record(self._torch.current_stream(self._device))
        return event

    def finish(self) -> None:
        """Wait until the device has passed every event."""
        self._torch.synchronize(self._device)

    def seconds(self, mark: Mark) -> float:
        """Host seconds at the event."""
        return self._origin_s + self._origin.elapsed_time(mark) / 1e3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CpuClock() if device.type == "cpu" else EventClock(device)


def host_identity() -> str:
    """Names the running kernel: ranks that agree on it share one monotonic clock, whatever their host names."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def compare_with_rank_0(
    device: torch.device,
    *,
    now: Callable[[], float] = time.monotonic,
    host: str | None = None,
    rounds: int = 20,
) -> ClockOffset:
    """What to add to this rank's clock to read rank 0's clock, as it is now. Collective over the default group.

    Ranks of one host share its clock, and those on rank 0's host need nothing. The first rank of every other host in
    turn asks rank 0 for its time, `rounds` times; of the quickest round trip, offset = answer - (sent + received) / 2,
    since the answer is taken to be from its middle (Cristian's algorithm, 1989). It is off by at most half of that
    round trip. `host` defaults to `host_identity()`.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    hosts: list[str] = [""] * size
    dist.all_gather_object(hosts, host if host is not None else host_identity())
    mine = ClockOffset(now(), 0.0)
    for peer in sorted(hosts.index(other) for other in set(hosts) - {hosts[0]}):
        if rank == 0:
            _serve_clock(peer, device, now, rounds)
        elif rank == peer:
            mine = _request_clock(device, now, rounds)
    found = [mine] * size
    dist.all_gather_object(found, mine)
    return found[hosts.index(hosts[rank])]


def _serve_clock(peer: int, device: torch.device, now: Callable[[], float], rounds: int) -> None:
    message = torch.zeros(1, dtype=torch.float64, device=device)
    for _ in range(rounds):
        dist.recv(message, peer)
        message.item()  # on a GPU a receive returns once it is queued: read the clock when it has come
        message.fill_(now())
        dist.send(message, peer)


def _request_clock(device: torch.device, now: Callable[[], float], rounds: int) -> ClockOffset:
    message = torch.zeros(1, dtype=torch.float64, device=device)
    best_delay_s, best = float("inf"), ClockOffset(0.0, 0.0)
    for _ in range(rounds):
        sent = now()
        dist.send(message, 0)
        dist.recv(message, 0)
        theirs = float(message.item())
        received = now()
        if received - sent < best_delay_s:
            middle_s = (sent + received) / 2
            best_delay_s, best = received - sent, ClockOffset(middle_s, theirs - middle_s)
    return best
