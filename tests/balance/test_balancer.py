"""When experts move: above the threshold, where past plans held, and where the gain outweighs the cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from piper_hpc.balance.balancer import SAMPLES, Balancer, Decision, counted_samples, horizon
from piper_hpc.spec import ExpertPlacement
from piper_hpc.spec.migration import MigrationPrices, MigrationSettings
from piper_hpc.spec.routing_workloads import global_draw

EXPERTS, EP, TOP_K, LAYERS, TOKENS = 32, 4, 4, 4, 512
PRICES = MigrationPrices(EP, TOP_K, row_s=1e-4, expert_s=1e-3)
SETTINGS = MigrationSettings("auto", every=4, threshold=1.1)


def balancer(prices: MigrationPrices = PRICES, settings: MigrationSettings = SETTINGS, steps: int = 64) -> Balancer:
    linear = ExpertPlacement.linear(EXPERTS, EP)
    return Balancer(settings, prices, [linear] * LAYERS, [[0, 1], [2, 3]], micro_batches=2, steps=steps)


def routed(workload: str, step: int) -> np.ndarray:
    """[samples, layers, experts] of two micro-batches."""
    return np.array(
        [
            [
                np.bincount(
                    global_draw(
                        workload, experts=EXPERTS, top_k=TOP_K, tokens=TOKENS, step=step, seed=10 * layer + sample,
                        hot_step=0 if workload == "W1" else None,
                    ).ravel(),
                    minlength=EXPERTS,
                )
                for layer in range(LAYERS)
            ]
            for sample in range(2)
        ]
    )  # fmt: skip


def decisions(one: Balancer, workload: str, steps: int = 64) -> Iterator[tuple[int, Decision]]:
    for step in range(steps):
        decision = one.after_step(step, routed(workload, step))
        if decision is not None:
            yield step, decision


def test_a_hot_rank_is_spread_once_as_soon_as_two_windows_agree() -> None:
    one = balancer()
    found = list(decisions(one, "W2"))
    step, first = found[0]
    assert step == 2 * SETTINGS.every - 1 and first.placements is not None
    assert first.imbalance > 2 and first.after < 1.1 and first.bound == 1.0
    assert first.held > 0.9 and first.gain_s * first.horizon_steps > first.cost_s > 0
    assert len(found) == 1, "what is even is below the threshold"
    assert all(placement.version == 1 for placement in one.placements)
    assert first.document()["migrated"] is True and "placements" not in first.document()


@pytest.mark.parametrize("workload", ["W0", "W7"])
def test_even_loads_and_bursts_move_nothing(workload: str) -> None:
    assert all(decision.placements is None for _, decision in decisions(balancer(), workload))


def test_a_hot_rank_that_rotates_moves_nothing_for_a_plan_would_not_hold() -> None:
    found = [decision for _, decision in decisions(balancer(), "W6")]
    assert found and all(decision.imbalance > 1.4 for decision in found)
    assert all(decision.placements is None and decision.held < 0.5 for decision in found)


def test_moves_that_cost_more_than_they_gain_are_not_made() -> None:
    dear = replace(PRICES, expert_s=1e3)
    assert all(decision.placements is None and decision.gain_s > 0 for _, decision in decisions(balancer(dear), "W2"))
    late = decisions(balancer(steps=9), "W2", steps=8)
    assert next(late)[1].horizon_steps < 2


def test_a_layer_that_is_even_keeps_its_experts() -> None:
    one = balancer()
    for step in range(8):
        counts = routed("W2", step)
        counts[:, 1] = routed("W0", step)[:, 1]
        one.after_step(step, counts)
    assert [placement.version for placement in one.placements] == [1, 0, 1, 1]


def test_the_threshold_holds_back() -> None:
    assert not list(decisions(balancer(settings=replace(SETTINGS, threshold=5.0)), "W2"))


def test_samples_are_spread_over_replicas_and_micro_batches() -> None:
    assert counted_samples(1, 3) == [(0, 0), (0, 1), (0, 2)]
    found = counted_samples(8, 32)
    assert len(found) == len(set(found)) == SAMPLES
    assert {replica for replica, _ in found} == set(range(8))


def test_the_horizon_is_what_is_left_where_plans_hold_and_nothing_where_they_do_not() -> None:
    assert horizon(1.0, 4, 22) == 22
    assert horizon(0.0, 4, 22) == 0
    assert horizon(0.5, 4, 1000) == pytest.approx(4)
    assert horizon(0.5, 4, 6) == pytest.approx(4 * 0.5 + 2 * 0.25)
