"""Placements that even out loads: the paper's vectors, equal ranks, bounds, and what deduplication changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.balance.loads import LayerSeconds, imbalance, least_imbalance, rank_rows
from piper_hpc.balance.planners import PLANNERS, evened, improved, nearest, packed, swap
from piper_hpc.spec.migration import LevelPrice, MigrationPrices
from piper_hpc.spec.routing_workloads import global_draw
from piper_hpc.spec.workload import Routing


def seconds(ep: int, top_k: int = 1, levels: tuple[LevelPrice, ...] = ()) -> LayerSeconds:
    return LayerSeconds(MigrationPrices(ep, top_k, row_s=1.0, expert_s=0.0, levels=levels))


def adjacent(experts: int, ep: int) -> np.ndarray:
    return np.arange(experts) // (experts // ep)


@pytest.mark.parametrize(
    ("groups", "swaps", "loads"),
    [
        ([[9, 8, 7], [1, 2, 3], [4, 5, 6], [5, 5, 5]], 1, [16, 14, 15, 15]),
        ([[40, 12], [30, 2], [9, 7], [3, 1]], 1, [15, 32, 16, 41]),
        ([[100, 1], [1, 1], [1, 1], [1, 1]], 0, [101, 2, 2, 2]),
    ],
)
def test_algorithm_2_does_as_printed(groups: Sequence[Sequence[int]], swaps: int, loads: list[int]) -> None:
    counts = np.array([[item for group in groups for item in group]])
    before = adjacent(counts.shape[1], len(groups))
    after = swap(counts, before, seconds(len(groups)))
    assert rank_rows(counts, after, len(groups))[0].tolist() == loads
    assert int((before != after).sum()) == 2 * swaps


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    ep, each, samples = draw(st.integers(2, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows = st.lists(st.integers(0, 50), min_size=ep * each, max_size=ep * each)
    counts = np.array(draw(st.lists(rows, min_size=samples, max_size=samples)))
    ranks = np.array(draw(st.permutations(range(ep * each)))) // each
    return counts, ranks, ep


@pytest.mark.parametrize("name", PLANNERS)
@settings(max_examples=60, deadline=None)
@given(problems())
def test_plans_keep_ranks_equal_and_are_the_same_again(name: str, problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    counts, ranks, ep = problem
    given_ranks = ranks.copy()
    plan = PLANNERS[name](counts, ranks, seconds(ep))
    assert np.bincount(plan, minlength=ep).tolist() == [len(ranks) // ep] * ep
    assert (ranks == given_ranks).all(), "a planner must not write to what it is given"
    assert (PLANNERS[name](counts.copy(), ranks.copy(), seconds(ep)) == plan).all()
    assert imbalance(counts, plan, ep) >= least_imbalance(counts, ep) - 1e-9


@settings(max_examples=60, deadline=None)
@given(problems())
def test_lpt_is_never_worse_than_what_was(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    counts, ranks, ep = problem
    price = seconds(ep)
    plan = PLANNERS["lpt"](counts, ranks, price)
    assert price(counts, plan) <= price(counts, ranks)
    assert price(counts, improved(counts, ranks, price)) <= price(counts, ranks)


@given(problems())
def test_the_nearest_packing_has_the_same_loads_and_moves_no_more(problem: tuple[np.ndarray, np.ndarray, int]) -> None:
    counts, ranks, ep = problem
    fresh = packed(counts, ep)
    near = nearest(fresh, ranks)
    loads = [sorted(rank_rows(counts, one, ep).sum(axis=0).tolist()) for one in (fresh, near)]
    assert loads[0] == loads[1]
    assert (near != ranks).sum() <= (fresh != ranks).sum()


@pytest.mark.parametrize(("experts", "ep"), [(32, 4), (64, 8), (64, 16), (256, 32)])
@pytest.mark.parametrize("workload", ["W1", "W2"])
def test_hot_experts_and_a_hot_rank_come_within_a_tenth_of_what_is_possible(
    experts: int, ep: int, workload: str
) -> None:
    """On steps that the plan was not made from: max/mean at most 1.10 of what equally many experts a rank allow."""
    size = {"experts": experts, "top_k": 4, "tokens": 4096, "seed": 1, "hot_step": 0}
    seen, later = (
        np.stack([np.bincount(global_draw(workload, step=s, **size).ravel(), minlength=experts) for s in steps])
        for steps in (range(8), range(8, 16))
    )
    before = adjacent(experts, ep)
    plan = PLANNERS["lpt"](seen, before, seconds(ep))
    assert imbalance(later, plan, ep) <= 1.10 * least_imbalance(later, ep)
    assert imbalance(later, plan, ep) <= imbalance(later, before, ep)


def test_the_largest_of_each_micro_batch_counts_and_not_that_of_their_sum() -> None:
    """Experts 0 and 1 are busy in turn: on one rank they even out, though sums say that nothing is gained."""
    counts = np.array([[9, 1, 5, 5], [1, 9, 5, 5]] * 2)
    apart = np.array([0, 1, 0, 1])
    plan = PLANNERS["lpt"](counts, apart, seconds(2))
    assert plan[0] == plan[1] and imbalance(counts, plan, 2) == 1.0
    assert (swap(counts, apart, seconds(2)) == apart).all(), "sums are even already"


def test_a_swap_that_saves_nothing_under_deduplication_is_not_made() -> None:
    """Two nodes of two ranks; every token wants four experts of node 0. What enters a node is all that counts: a hot
    expert fewer there saves a quarter of the rows, but with deduplication every token still enters for the others."""
    counts, start = np.array([[100, 100, 100, 100, 4, 4, 4, 4]]), adjacent(8, 4)
    plans = {}
    for dedup in (False, True):
        price = LayerSeconds(MigrationPrices(4, 4, 0.0, 0.0, (LevelPrice((0, 0, 1, 1), 1.0, dedup),)))
        plans[dedup] = PLANNERS["lpt"](counts, start, price)
    assert set((plans[False][:4] // 2).tolist()) == {0, 1}
    assert (plans[True] == start).all()


def test_rows_that_enter_a_domain_are_counted_once_a_token_with_deduplication() -> None:
    """Two ranks, each a domain; every token chooses experts 0 and 1, both of rank 0: T rows enter it, half from
    elsewhere, and 2 T without deduplication."""
    counts, ranks = np.array([[10, 10, 0, 0]]), np.array([0, 0, 1, 1])
    for dedup, entering in ((True, 10.0), (False, 20.0)):
        price = LayerSeconds(MigrationPrices(2, 2, 0.0, 0.0, (LevelPrice((0, 1), 1.0, dedup),)))
        assert price(counts, ranks) == pytest.approx(entering / 2)


def test_a_layer_without_a_token_is_even() -> None:
    nothing = np.zeros((2, 4), np.int64)
    assert imbalance(nothing, adjacent(4, 2), 2) == least_imbalance(nothing, 2) == 1.0
    for plan in PLANNERS.values():
        assert (plan(nothing, adjacent(4, 2), seconds(2)) == adjacent(4, 2)).all()


def test_evened_shares_are_the_packed_ones_and_a_bare_skew_is_spread() -> None:
    shares = tuple(np.array([8, 1, 1, 1, 1, 1, 1, 1, 1]) / 16)
    even = evened(Routing(histogram=shares), 9, 3)
    assert sorted(even.histogram) == sorted(shares)
    assert float(even.load(3)) == pytest.approx(3 * 10 / 16) == pytest.approx(least_imbalance(np.array([shares]), 3))
    assert float(evened(Routing(imbalance=3.0), 32, 4).load(4)) == pytest.approx(1.0)
