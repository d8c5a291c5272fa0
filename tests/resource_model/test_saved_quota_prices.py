"""What a rank under a CPU quota saves while it waits: by hand, and in the terms of a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.saved_quota import left_of
from piper_hpc.spec import CpuQuota, Layout, Workload
from tests.resource_model.clusters import TINY, calibration, cluster

FIFTH = CpuQuota(share=0.2, period_s=0.010)


@pytest.mark.parametrize(
    ("wait_s", "busy_s", "left"),
    [
        (0.003, 0.080, 77 / 80),  # the wait itself
        (0.020, 0.080, 70 / 80),  # at most a period
        (0.020, 0.001, 0.2),  # at most the whole core's speed
        (0.0, 0.080, 1.0),
    ],
)
def test_a_wait_saves_itself_up_to_a_period_and_to_the_whole_core(wait_s: float, busy_s: float, left: float) -> None:
    assert left_of(FIFTH, wait_s, busy_s) == pytest.approx(left)
    assert left_of(None, wait_s, busy_s) == 1.0


def test_only_what_follows_a_wait_is_shorter() -> None:
    layout, workload = Layout(ep=4, micro_batch=2), Workload(32, 128)
    plain = cluster()
    given = replace(calibration(), provenance=calibration().provenance | {"cpu_share": "0.2"})
    under_quota = replace(plain, calibration=given)
    free, limited = (predict(TINY, where, layout, workload).terms for where in (plain, under_quota))
    computed = {"attention_s", "router_s", "expert_s", "other_s"}
    # Of two ranks that compute less the later one is less late at the reduction.
    assert {term for term in free if limited[term] < free[term]} == computed | {"grad_reduce_s"}
    for term in ("attention_s", "router_s", "expert_s"):
        assert 0.2 * free[term] <= limited[term]
    longer = replace(given, provenance=given.provenance | {"quota_period_us": "1"})
    barely = predict(TINY, replace(plain, calibration=longer), layout, workload).terms
    assert barely["attention_s"] == pytest.approx(free["attention_s"], rel=1e-2)
    shared = replace(under_quota, devices_share_cores=True, cores=2.0)
    assert predict(TINY, shared, layout, workload).terms == pytest.approx(
        predict(TINY, replace(plain, devices_share_cores=True, cores=2.0), layout, workload).terms
    )
