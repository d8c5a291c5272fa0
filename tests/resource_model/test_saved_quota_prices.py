"""What a rank under a CPU quota saves while it waits: by hand, and in the terms of a step."""

from __future__ import annotations

import random
from dataclasses import replace
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.saved_quota import left_of
from piper_hpc.resource_model.eager.step import step_cost
from piper_hpc.spec import CpuQuota, Layout, MeasuredAllToAll, Workload
from tests.resource_model.clusters import TINY, calibration, cluster, slower

FIFTH = CpuQuota(share=0.2, period_s=0.010)


@pytest.mark.parametrize(
    ("wait_s", "busy_s", "left"),
    [
        (0.003, 0.080, 77 / 80),  # the wait itself: no quota begins meanwhile
        (0.002, 0.004, 0.8),  # 0.8 ms of CPU: where less is left, 0.4 of all times, it would have stood still
        (0.0, 0.080, 1.0),
    ],
)
def test_a_short_wait_saves_what_the_rank_would_have_stood_still(wait_s: float, busy_s: float, left: float) -> None:
    assert left_of(FIFTH, wait_s, busy_s) == pytest.approx(left, abs=0.02)


@given(st.floats(1e-4, 1.0), st.floats(1e-4, 1.0), st.floats(0.05, 0.9))
def test_a_wait_saves_no_more_than_itself_and_periods_and_the_whole_core_allow(
    wait_s: float, busy_s: float, share: float
) -> None:
    quota = CpuQuota(share, 0.010)
    saved_s = (1 - left_of(quota, wait_s, busy_s)) * busy_s
    assert (
        -1e-9
        <= saved_s
        <= min(2 * wait_s, 1.5 * quota.period_s, (1 - share) * busy_s) + 0.05 * min(quota.period_s, busy_s)
    )


def test_what_is_left_is_that_of_a_rank_that_is_played_through() -> None:
    """Steps of 20 us: a quota that is made whole every period, a wait anywhere in the rank's compute, then compute."""
    quota, wait_s, busy_s, step_s = CpuQuota(0.2, 0.010), 0.012, 0.020, 2e-5
    generator, found = random.Random(0), []
    for _ in range(400):
        since, waited = generator.uniform(0, quota.share * quota.period_s), generator.uniform(0, 2 * wait_s)
        left, needed, taken = quota.share * quota.period_s - since, quota.share * busy_s, 0.0
        while needed > 0:
            if since >= quota.period_s:
                since, left = since - quota.period_s, quota.share * quota.period_s
            if waited > 0:
                waited -= step_s
            else:
                taken += step_s
                if left > 0:
                    left, needed = left - step_s, needed - step_s
            since += step_s
        found.append(taken)
    assert left_of(quota, wait_s, busy_s) == pytest.approx(fmean(found) / busy_s, rel=0.05)


def test_only_what_follows_a_wait_is_shorter() -> None:
    layout, workload = Layout(ep=4, micro_batch=2), Workload(32, 128)
    plain = cluster()
    given = replace(calibration(), provenance=calibration().provenance | {"cpu_share": "0.2"})
    under_quota = replace(plain, calibration=given)
    free, limited = (predict(TINY, where, layout, workload).terms for where in (plain, under_quota))
    computed = {"attention_s", "router_s", "expert_s", "other_s", "dispatch_s", "combine_s"}
    # Of two ranks that compute less the later one is less late at the reduction.
    assert {term for term in free if limited[term] < free[term]} == computed | {"grad_reduce_s"}
    for term in ("attention_s", "router_s", "expert_s"):
        assert 0.2 * free[term] <= limited[term]
    later = replace(under_quota, calibration=slower(given, "skew/rack/4", 3.0))
    waited = predict(TINY, later, layout, workload).terms
    assert waited["attention_s"] < limited["attention_s"] and waited["dispatch_s"] > limited["dispatch_s"]
    assert waited["head_s"] == limited["head_s"]
    longer = replace(given, provenance=given.provenance | {"quota_period_us": "1"})
    barely = predict(TINY, replace(plain, calibration=longer), layout, workload).terms
    assert barely["attention_s"] == pytest.approx(free["attention_s"], rel=1e-2)
    shared = replace(under_quota, devices_share_cores=True, cores=2.0)
    assert predict(TINY, shared, layout, workload).terms == pytest.approx(
        predict(TINY, replace(plain, devices_share_cores=True, cores=2.0), layout, workload).terms
    )


def test_an_algorithm_saves_by_what_was_measured_of_its_own_waits() -> None:
    """Twice flat's seconds, and the same or a quarter of flat's standing still."""

    def measured(algorithm: str, slower: float, idle: float) -> list[MeasuredAllToAll]:
        return [
            MeasuredAllToAll(
                algorithm=algorithm, seconds=slower * (2e-3 + size / 1e8), idle_s=idle * (1e-3 + size / 2e8), ranks=4,
                nodes=2, racks=1, logical_bytes=size, row_bytes=512.0, top_k=2, experts=8, imbalance=1.0,
            )
            for size in (1e3, 3e3, 1e4, 3e4, 1e5, 3e5, 1e6, 3e6, 1e7, 1e8)
        ]  # fmt: skip

    def found(of_halo: float) -> tuple[float, float, dict[str, float]]:
        rows = (*measured("flat", 1, 1), *measured("halo", 2, of_halo))
        given = replace(calibration(), exchanges=rows, provenance=calibration().provenance | {"cpu_share": "0.2"})
        where, layout = replace(cluster(), calibration=given), Layout(ep=4, micro_batch=2, all_to_all="halo")
        ((_, exchange),) = step_cost(TINY, where, layout, Workload(32, 128)).all_to_alls
        return exchange.wire.cost.seconds, exchange.wire.idle_s, predict(TINY, where, layout, Workload(32, 128)).terms

    (same_s, idle_s, terms), (also_s, quarter_s, fewer) = found(1.0), found(0.25)
    assert also_s == same_s
    assert quarter_s / idle_s == pytest.approx(0.25, rel=0.1)
    computed = ("attention_s", "router_s", "expert_s")
    assert sum(fewer[term] for term in computed) > sum(terms[term] for term in computed)
