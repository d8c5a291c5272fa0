"""Arrival skew: ranks that have computed do not arrive at a collective together, and the early ones wait for the late.

Quotas, the scheduler of the host and wake-ups decide when a rank arrives; a collective after a rest, as its own curve
measures it, sees none of that. Its rows and curves are named `skew/tier/size`.
"""

from __future__ import annotations

from time import perf_counter

from piper_hpc.microbench.timing import EXCHANGE_SAMPLES, WARMUP_SAMPLES, Call, SamplingPlan, Team, Timing


def time_arrival_skew(compute: Call, collective: Call, together_s: float, team: Team, share_s: float) -> Timing:
    """Extra seconds of `collective` when every rank calls `compute` before each call, by rank and sample.

    together_s: seconds of the collective by itself, as its own curve has it; a sample is the mean of several calls
    less that, so it may be below zero. Their number is agreed by all ranks, also by those that take no part.
    """

    def sample(calls: int) -> float:
        inside_s = 0.0
        for _ in range(calls):
            compute()
            team.wait_for_device()
            start = perf_counter()
            collective()
            team.wait_for_device()
            inside_s += perf_counter() - start
        return inside_s / calls - together_s

    def cycle_s(cycles: int) -> float:
        start = perf_counter()
        sample(cycles)
        return (perf_counter() - start) / cycles

    team.barrier()
    pilot_s, share_s = team.maximum(cycle_s(1), share_s)
    (pilot_s,) = team.maximum(cycle_s(max(1, int(share_s / 10 / pilot_s))))
    sampling = SamplingPlan.plan(pilot_s, share_s, EXCHANGE_SAMPLES)
    team.barrier()
    for _ in range(WARMUP_SAMPLES):
        sample(sampling.iterations)
    samples = team.table([sample(sampling.iterations) for _ in range(sampling.samples)])
    return Timing(samples, sampling.iterations)
