"""Skew: ranks that have computed do not arrive at an exchange together, and the early ones wait for the late.

Quotas, the scheduler of the host and wake-ups decide when a rank arrives; an exchange after a rest, as its own curve
measures it, sees none of that. Waiting also saves quota, so that compute between meetings takes less time than without
them: both are measured on the same cycles, over the seconds that busy ranks need for that compute.
"""

from __future__ import annotations

from time import perf_counter, sleep

from piper_hpc.microbench.timing import EXCHANGE_SAMPLES, REST_S, WARMUP_SAMPLES, Call, Effort, Team, Timing

RESTED_SAMPLES = 3


def time_skew(compute: Call, exchange: Call, together_s: float, team: Team, share_s: float) -> tuple[Timing, Timing]:
    """Extra seconds of `exchange` when every rank calls `compute` before each of them, and those of that `compute`.

    together_s: what the exchange takes by itself, as its own curve has it; a sample of the first is the mean of several
    exchanges less that, so it may be below zero. Both are by rank and sample. Their number is agreed by all ranks, also
    by those that take no part.
    """

    def sample(exchanges: int) -> tuple[float, float]:
        inside_s = computed_s = 0.0
        for _ in range(exchanges):
            begin = perf_counter()
            compute()
            team.wait_for_device()
            start = perf_counter()
            exchange()
            team.wait_for_device()
            inside_s += perf_counter() - start
            computed_s += start - begin
        return inside_s / exchanges - together_s, computed_s / exchanges

    def cycle_s(cycles: int) -> float:
        start = perf_counter()
        sample(cycles)
        return (perf_counter() - start) / cycles

    team.barrier()
    pilot_s, share_s = team.maximum(cycle_s(1), share_s)
    (pilot_s,) = team.maximum(cycle_s(max(1, int(share_s / 10 / pilot_s))))
    effort = Effort.plan(pilot_s, share_s, EXCHANGE_SAMPLES)
    team.barrier()
    for _ in range(WARMUP_SAMPLES):
        sample(effort.iterations)
    samples = [sample(effort.iterations) for _ in range(effort.samples)]
    extra, computed = (team.table(values) for values in zip(*samples, strict=True))
    return Timing(extra, effort.iterations), Timing(computed, effort.iterations)


def time_rested(compute: Call, busy_s: float, team: Team, share_s: float) -> Timing:
    """Seconds of `compute` after a wait that is as long as a rank can save quota for; `busy_s` of them when it cannot.

    A kernel counts a quota at its timer's ticks, so that a rank may overdraw it and pay back while it waits: a rest of
    several periods shows all that waiting can give.
    """
    rest_s = 3 * REST_S
    samples = int(0.67 * share_s / (rest_s + busy_s))
    (count,) = team.maximum(float(max(RESTED_SAMPLES, min(10, samples))))

    def sample() -> float:
        sleep(rest_s)
        start = perf_counter()
        compute()
        team.wait_for_device()
        return perf_counter() - start

    team.barrier()
    return Timing(team.table([sample() for _ in range(int(count))]), 1)
