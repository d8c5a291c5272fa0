"""Loads W0 to W7: what they promise of each expert, source and token, for any size; and their closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.microbench.dispatch.cells import Cell
from piper_hpc.resource_model.all_to_all import AllToAllRouting, dedup_ratio
from piper_hpc.spec.routing_workloads import (
    WORKLOADS,
    draw,
    global_draw,
    hot_experts,
    imbalance,
    reach_probability_by_domain,
)

SIZE = {"experts": 64, "top_k": 8}


@settings(max_examples=60, deadline=None)
@given(
    workload=st.sampled_from(WORKLOADS),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 8),
    ranks=st.integers(1, 9),
    tokens=st.integers(0, 30),
    step=st.integers(0, 20),
    seed=st.integers(0, 2**32),
)
def test_every_token_has_distinct_experts_and_ranks_share_one_draw(
    workload: str, experts: int, top_k: int, ranks: int, tokens: int, step: int, seed: int
) -> None:
    size = {"experts": experts, "top_k": min(top_k, experts), "tokens": tokens, "step": step, "seed": seed}
    parts = [draw(workload, ranks=ranks, rank=rank, **size) for rank in range(ranks)]
    ids, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert ids.dtype == np.int64 and weights.dtype == np.float32
    assert np.array_equal(ids, global_draw(workload, **size | {"tokens": len(ids)}))
    assert all(len(set(chosen)) == size["top_k"] for chosen in ids.tolist())
    assert len(ids) == 0 or (ids.min() >= 0 and ids.max() < experts)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    again = draw(workload, ranks=ranks, rank=ranks - 1, **size)
    assert np.array_equal(again[0], parts[-1][0]) and np.array_equal(again[1], parts[-1][1])


@pytest.mark.parametrize(("experts", "top_k"), [(64, 8), (10, 4), (7, 3)])
def test_balanced_means_equal_loads_from_every_source(experts: int, top_k: int) -> None:
    """Within one, also of the tokens of one source alone where whole permutations fit them."""
    ids = global_draw("W0", experts=experts, top_k=top_k, tokens=8 * 70)
    loads = np.bincount(ids.ravel(), minlength=experts)
    assert loads.max() - loads.min() <= 1
    for source in np.split(ids, 8):
        loads = np.bincount(source.ravel(), minlength=experts)
        assert loads.max() - loads.min() <= 2


def test_sources_of_w4_and_w5() -> None:
    w4 = [len(draw("W4", ranks=8, tokens=500, rank=rank, **SIZE)[0]) for rank in range(8)]
    assert w4 == [200] * 4 + [800] * 4
    w5 = [draw("W5", ranks=8, tokens=50, rank=rank, **SIZE)[0] for rank in range(8)]
    assert [len(ids) for ids in w5] == [0, 58, *[57] * 6], "of 50 on average"
    loads = np.bincount(np.concatenate(w5).ravel(), minlength=64)
    assert not loads[56:].any() and loads[:56].min() >= 49


@pytest.mark.parametrize(
    ("workload", "step", "hot", "share"),
    [
        ("W2", 0, range(8), 0.5),
        ("W3", 0, range(0, 64, 8), 0.5),
        ("W6", 0, range(8), 0.5),
        ("W6", 9, range(16, 24), 0.5),
        ("W7", 15, range(8), 0.5),
    ],
)
def test_hot_experts_get_their_share(workload: str, step: int, hot: range, share: float) -> None:
    ids = global_draw(workload, tokens=4096, step=step, **SIZE)
    assert np.isin(ids, list(hot)).mean() == pytest.approx(share, abs=0.01)
    loads = np.bincount(ids.ravel(), minlength=64)
    assert loads[list(hot)].min() > 1.5 * np.delete(loads, list(hot)).max()


def test_w1_heats_few_experts_that_the_draw_picks() -> None:
    """Two of 64 can have a quarter of all assignments at most: every token chooses both."""
    picked = {hot_experts("W1", seed=seed, **SIZE).experts for seed in range(8)}  # type: ignore[union-attr]
    assert len(picked) > 1 and all(len(hot) == 2 for hot in picked)
    loads = np.bincount(global_draw("W1", tokens=512, **SIZE).ravel(), minlength=64)
    assert sorted(loads)[-2:] == [512, 512]


def test_imbalance_of_a_hot_rank_and_of_a_burst() -> None:
    """Half of all rows for one rank of eight are four times the mean; of sixteen, two ranks share them. The heavy
    sources of W4 send 8/5 of the mean."""
    assert imbalance("W4", ranks=8, tokens=500, **SIZE) == pytest.approx(1.6)
    assert imbalance("W2", ranks=8, tokens=512, **SIZE) == pytest.approx(4, rel=0.01)
    assert imbalance("W2", ranks=16, tokens=512, **SIZE) == pytest.approx(4, rel=0.03)
    assert imbalance("W3", ranks=8, tokens=512, **SIZE) < 1.1
    assert imbalance("W7", ranks=8, tokens=512, **SIZE) == 1
    step = Cell("W7", 64, 8, 512, 512).step(3)
    assert step == 31 and imbalance("W7", ranks=8, tokens=512, step=step, **SIZE) > 3.9


@pytest.mark.parametrize("domains", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_balanced_share_of_rows_is_the_cost_models(domains: int, top_k: int) -> None:
    found = sum(reach_probability_by_domain("W0", experts=64, top_k=top_k, domains=domains)) / top_k
    assert found == pytest.approx(float(dedup_ratio(domains, AllToAllRouting(64, top_k))))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_closed_form_of_domains_entered_is_what_is_drawn(workload: str) -> None:
    ids = global_draw(workload, tokens=8192, **SIZE)
    counted = [float(((ids // 16) == domain).any(1).mean()) for domain in range(4)]
    assert reach_probability_by_domain(workload, domains=4, **SIZE) == pytest.approx(counted, abs=0.015)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"workload=W9: must be one of W0"):
        draw("W9", experts=4, top_k=2, ranks=1, tokens=1, rank=0)
    with pytest.raises(ValueError, match=r"top_k=5: must be from 1 to experts=4, for example 4"):
        draw("W0", experts=4, top_k=5, ranks=1, tokens=1, rank=0)
