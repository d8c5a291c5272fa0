"""Timing that all ranks do together, within a budget: warm-up, agreed effort, samples, and their statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, process_time, sleep

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.runtime.quota import StandStill

SAMPLE_S = 0.03
"""A sample lasts at least this long where the budget allows it: several 10 ms periods of a CPU quota."""
COMPUTE_SAMPLES = 3
"""At least so many on each rank; a row has those of all ranks."""
EXCHANGE_SAMPLES = 8
"""At least so many of an exchange after compute: waking a rank up takes a time that varies."""
RESTED_SAMPLES = 4
REST_S = 0.012
"""A CPU rank waits so long before an exchange is timed: longer than a period of its quota, which is then whole."""
MAX_SAMPLES = 30
WARMUP_SAMPLES = 1

Call = Callable[[], object]


@dataclass(frozen=True)
class Spent:
    """Seconds of a call on one rank; those of a core that its process computed; and in which it waited for others or
    for the wire: neither computed nor stood still for want of quota."""

    seconds: float
    computed_s: float
    idle_s: float


class Team:
    """The ranks of the default process group, with the small reductions and gathers that timing needs.

    cores_per_rank: where ranks share a machine's cores without a quota, how much of one each has while all are busy;
    None where every rank has a device, or a quota, of its own.
    """

    def __init__(self, device: torch.device, cores_per_rank: float | None = None) -> None:
        self.shares_cores = cores_per_rank is not None
        self.device = device
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        measured = self._core_share() if device.type == "cpu" else 1.0
        self.core_share = measured if cores_per_rank is None else cores_per_rank
        self._stand_still = StandStill.of_this_process()

    def _core_share(self, span_s: float = 0.08) -> float:
        """What share of a core a busy rank gets while all are busy, mean over ranks: its quota, where it has one."""
        self.barrier()
        values = torch.ones(4096)
        start, start_cpu = perf_counter(), process_time()
        while perf_counter() - start < span_s:
            values.mul_(1.0)
        return float(self.table([(process_time() - start_cpu) / (perf_counter() - start)]).mean())

    def maximum(self, *values: float) -> list[float]:
        """The largest of each value over all ranks, the same list on every rank."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def table(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's values, [world, len(values)]; all ranks give equally many."""
        mine = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        all_values = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(all_values, mine)
        return torch.stack(all_values).cpu().numpy()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def spent(self, call: Call) -> Spent:
        """What a call takes of this rank, and its device; the group's barrier before it is the caller's."""
        throttled_s, computed_s, started = self._stand_still.seconds(), process_time(), perf_counter()
        call()
        self.wait_for_device()
        seconds, computed_s = perf_counter() - started, process_time() - computed_s
        throttled_s = self._stand_still.seconds() - throttled_s
        return Spent(seconds, computed_s, max(0.0, seconds - computed_s - throttled_s))

    def wait_for_device(self) -> None:
        """Wait until this rank's device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class Budget:
    """Seconds for a number of points: what is left is shared equally by the points that are left."""

    def __init__(self, seconds: float, points: int) -> None:
        self._deadline = perf_counter() + seconds
        self._points = points
        self._least_s = 0.5 * seconds / points

    def share(self, points: int = 1) -> float:
        """Seconds for the next points; never less than half an equal share, so that late points are measured well."""
        return points * max(self._least_s, (self._deadline - perf_counter()) / max(1, self._points))

    def spend(self, points: int = 1) -> None:
        """Count points as measured or left out."""
        self._points -= points


@dataclass(frozen=True)
class SamplingPlan:
    """How one point is sampled, the same on all ranks: samples of `iterations` calls each, or of `sample_s` seconds."""

    samples: int
    iterations: int
    sample_s: float

    @staticmethod
    def plan(iteration_s: float, share_s: float, least: int) -> SamplingPlan:
        """Fill `share_s` seconds with warm-up and at least `least` samples of calls that take `iteration_s` each.

        A third of the share is left for what surrounds the samples: building, the pilot, barriers.
        """
        filled_s = 0.67 * share_s
        sample_s = min(SAMPLE_S, filled_s / (WARMUP_SAMPLES + least))
        iterations = max(1, math.ceil(sample_s / iteration_s))
        samples = int(filled_s / max(sample_s, iteration_s)) - WARMUP_SAMPLES
        return SamplingPlan(min(MAX_SAMPLES, max(3, samples)), iterations, sample_s)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: `samples` [ranks, samples] and the calls that each sample averages on this rank.

    idle: likewise, of an exchange between CPU ranks the seconds in which a rank computes nothing; None of others.
    """

    samples: np.ndarray
    iterations: int
    idle: np.ndarray | None = None

    def statistics(self) -> dict[str, float | int]:
        """The statistics of a measurement row, over all ranks' samples."""
        p5, median, p95 = np.percentile(self.samples, [5, 50, 95])
        return {
            "n": self.samples.shape[1],
            "warmup": WARMUP_SAMPLES,
            "iterations_per_sample": self.iterations,
            "median_s": float(median),
            "mean_s": float(self.samples.mean()),
            "p5_s": float(p5),
            "p95_s": float(p95),
            "min_s": float(self.samples.min()),
            "max_s": float(self.samples.max()),
        }


def _seconds(call: Call, iterations: int, team: Team) -> float:
    """Mean seconds of one call over `iterations` of them."""
    start = perf_counter()
    for _ in range(iterations):
        call()
    team.wait_for_device()
    return (perf_counter() - start) / iterations


def time_compute(call: Call, team: Team, share_s: float) -> Timing:
    """Time a call that needs no other rank, on all ranks at once, as they train.

    Each sample ends by the clock and not by a count, so that every rank is busy for the whole measurement and, under
    a CPU quota, a sample spans whole periods of it. The warm-up sample spends what a quota granted while waiting. Where
    ranks share cores a sample is the CPU time that the calls took, stretched to a rank's part of a core: others are
    never busy all the time, and what is left to one is theirs in training.
    """
    pilot_s = _seconds(call, 1, team)
    iteration_s, share_s = team.maximum(_seconds(call, max(1, int(1e-3 / pilot_s)), team), share_s)
    sampling = SamplingPlan.plan(iteration_s, share_s, COMPUTE_SAMPLES)
    # The clock is read once in a while: often enough to end a sample in time, seldom enough to cost nothing.
    stride = max(1, int(sampling.sample_s / 20 / iteration_s))

    def sample() -> tuple[float, int]:
        start, used, calls = perf_counter(), process_time(), 0
        while True:
            for _ in range(stride):
                call()
            team.wait_for_device()
            calls += stride
            elapsed = perf_counter() - start
            if elapsed >= sampling.sample_s:
                spent = (process_time() - used) / team.core_share if team.shares_cores else elapsed
                return spent / calls, calls

    team.barrier()
    for _ in range(WARMUP_SAMPLES):
        sample()
    samples = [sample() for _ in range(sampling.samples)]
    return Timing(team.table([seconds for seconds, _ in samples]), samples[0][1])


def time_exchange(call: Call, team: Team, share_s: float) -> Timing:
    """Time a collective call: the same number of calls on every rank, after a barrier.

    On CPU ranks each sample is one call after a rest. Called back to back, small exchanges use a rank's quota up, and
    what is timed is its waiting for the next period, 20 to 100 times what they take in a step. In its place a sample
    adds what a busy rank pays: the CPU time that the call used is stretched to the share of a core that the rank has.
    Where it neither computed nor stood still because its quota was used up after all, it is idle: a rank waits for the
    others, and for the wire.
    Ranks that do not take part give a call that does nothing; their samples are in the table and mean nothing.
    """
    rest_s = REST_S if team.device.type == "cpu" else 0.0
    team.barrier()
    iteration_s, share_s = team.maximum(_seconds(call, 2, team), share_s)
    if rest_s:
        samples = min(MAX_SAMPLES, max(RESTED_SAMPLES, int(0.67 * share_s / (rest_s + iteration_s))))
        sampling = SamplingPlan(samples, 1, iteration_s)
    else:
        again = max(1, min(100, int(share_s / 20 / iteration_s)))  # the first calls open connections
        (iteration_s,) = team.maximum(_seconds(call, again, team))
        sampling = SamplingPlan.plan(iteration_s, share_s, EXCHANGE_SAMPLES)

    def sample() -> tuple[float, float]:
        sleep(rest_s)
        team.barrier()
        if not rest_s:
            return _seconds(call, sampling.iterations, team), 0.0
        spent = team.spent(call)
        return spent.idle_s + spent.computed_s / team.core_share, spent.idle_s

    for _ in range(WARMUP_SAMPLES):
        sample()
    seconds, idle = zip(*(sample() for _ in range(sampling.samples)), strict=True)
    return Timing(team.table(seconds), sampling.iterations, team.table(idle) if rest_s else None)
