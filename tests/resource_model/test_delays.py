"""Passes that do not take equally long: how unequal they are, and how much later a pipeline ends for it."""

from __future__ import annotations

from random import Random
from statistics import fmean, pvariance

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.delays import latest_of, unequal, variance_of_meetings
from piper_hpc.resource_model.eager.groups import Group
from piper_hpc.resource_model.eager.predict import timeline
from piper_hpc.resource_model.eager.step import step_cost
from piper_hpc.spec import Layout, Workload
from tests.resource_model.clusters import TINY, calibration, cluster, slower

PAIR, EIGHT = Group((0, 1, 0, 0, 0)), Group((0, 1, 0, 6, 0))


@pytest.mark.parametrize(
    ("ranks", "mean", "deviation"), [(1, 0.0, 1.0), (2, 0.5642, 0.8256), (4, 1.0294, 0.7012), (8, 1.4236, 0.6107)]
)
def test_the_latest_rank_is_as_late_as_tables_of_order_statistics_say(
    ranks: int, mean: float, deviation: float
) -> None:
    """Teichroew (1956), Tables of expected values of order statistics."""
    assert latest_of(ranks) == pytest.approx((mean, deviation), abs=0.01)


def test_the_more_ranks_meet_the_steadier_they_are_for_how_long_they_wait() -> None:
    waits = [Cost(1e-3), Cost(2e-3)]
    assert variance_of_meetings(waits, PAIR) == pytest.approx(5e-6 * (0.8256 / 0.5642) ** 2, rel=0.02)
    assert variance_of_meetings(waits, EIGHT) < variance_of_meetings(waits, PAIR)


@given(st.floats(1e-4, 10.0), st.floats(0.0, 0.5), st.integers(1, 200))
def test_unequal_passes_keep_their_mean(mean_s: float, cv: float, count: int) -> None:
    drawn = unequal(mean_s, (cv * mean_s) ** 2, count, Random(0))
    assert len(drawn) == count and min(drawn) > 0 and fmean(drawn) == pytest.approx(mean_s)
    assert drawn == unequal(mean_s, (cv * mean_s) ** 2, count, Random(0))


def test_unequal_passes_have_about_the_variance_that_was_asked_for() -> None:
    assert pvariance(unequal(0.05, 1e-4, 64, Random(0))) == pytest.approx(1e-4, rel=0.1)
    assert unequal(0.05, 0.0, 3, Random(0)) == [0.05] * 3 and unequal(0.0, 1.0, 3, Random(0)) == [0.0] * 3


@pytest.mark.parametrize(
    "layout", [Layout(pp=4, ep=2, micro_batch=1), Layout(pp=4, dp=2, micro_batch=1, schedule="gpipe")]
)
def test_a_pipeline_waits_for_its_late_passes(layout: Layout) -> None:
    """Longer than where all passes take as long, by more the later ranks are."""
    workload = Workload(32, 128)
    never = calibration("skew/node/2", "skew/rack/4")
    late = calibration()
    later = slower(slower(late, "skew/node/2", 3.0), "skew/rack/4", 3.0)
    waited = []
    for measured in (never, late, later):
        cost = step_cost(TINY, cluster(measured), layout, workload)
        equal = timeline(TINY, cluster(measured), layout, workload)
        together_s = max(end + rank.before_norm_s for end, rank in zip(equal.end_s, cost.ranks, strict=True))
        equal_s = together_s + max(rank.update.after_norm_s for rank in cost.ranks)
        waited.append(predict(TINY, cluster(measured), layout, workload).step_time_s / equal_s)
    assert waited[0] == pytest.approx(1.0, rel=1e-9) and waited[0] < waited[1] < waited[2]


def test_without_a_pipeline_delays_even_out() -> None:
    layout, workload = Layout(ep=4, dp=2, micro_batch=1), Workload(32, 128)
    found = predict(TINY, cluster(), layout, workload)
    assert found.terms["bubble_s"] == pytest.approx(0.0, abs=1e-9)
