"""What one more row on the busiest rank and one more moved expert are priced at, from curves that hands can follow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.migration import migration_prices, moved_bytes
from piper_hpc.spec import RECIPES, TRAINED, Layout, Routing, Workload
from tests.resource_model.clusters import TINY, calibration, cluster, slower

WORKLOAD = Workload(global_batch=32, sequence=128)
LAYOUT = Layout(pp=2, ep=4, micro_batch=2)


def test_a_row_is_worth_what_the_predicted_step_changes_by() -> None:
    """One stage's layers times micro-batches times rows: what the prediction adds from mean load to twice the mean."""
    layout = Layout(pp=1, ep=4, dp=2, micro_batch=2)
    even, uneven = (
        predict(TINY, cluster(), layout, replace(WORKLOAD, routing=Routing(imbalance=load))).step_time_s
        for load in (1.0, 2.0)
    )
    prices = migration_prices(TINY, cluster(), layout, WORKLOAD)
    rows = layout.micro_batch * WORKLOAD.sequence * TINY.top_k
    times = TINY.layers * layout.micro_batches(WORKLOAD.global_batch)
    # The prediction also counts arrival skew, which grows with the compute before each exchange.
    assert (uneven - even) / (rows * times) == pytest.approx(prices.row_s, rel=0.25)
    assert (prices.ep, prices.top_k, prices.levels) == (4, 2, ())


def test_slower_experts_make_rows_dearer_and_slower_links_moves() -> None:
    base = migration_prices(TINY, cluster(), LAYOUT, WORKLOAD)
    slow_gemm = migration_prices(TINY, cluster(slower(calibration(), "grouped_gemm/64")), LAYOUT, WORKLOAD)
    assert slow_gemm.row_s > 1.2 * base.row_s and slow_gemm.expert_s == base.expert_s
    slow_link = migration_prices(TINY, cluster(slower(calibration(), "p2p/rack")), LAYOUT, WORKLOAD)
    assert slow_link.expert_s == pytest.approx(2 * base.expert_s) and slow_link.row_s == base.row_s
    moved = moved_bytes(TINY, RECIPES["float32"], copies=1, zero=0)
    assert base.expert_s == pytest.approx(1e-5 + moved / 1e9, rel=0.02)  # between the curve's points


def test_hierarchical_exchanges_are_priced_by_node() -> None:
    flat, halo = (
        migration_prices(TINY, cluster(), replace(LAYOUT, all_to_all=name), WORKLOAD) for name in ("flat", "halo_dedup")
    )
    (level,) = halo.levels
    assert level.domain_of_rank == (0, 0, 1, 1) and level.dedup and level.row_s > 0
    assert halo.row_s < flat.row_s, "what crosses links is no longer in the rank's rows"


@pytest.mark.parametrize(
    ("recipe", "copies", "zero", "per_parameter"),
    [
        ("float32", 1, 0, 12),
        ("bfloat16", 1, 0, 14),
        ("bfloat16", 4, 0, 14),
        ("bfloat16", 4, 1, 5),
        ("float32", 4, 1, 7),
    ],
)
def test_bytes_of_a_move(recipe: str, copies: int, zero: int, per_parameter: int) -> None:
    """2 of weights, 4 of master and 8 of moments in bf16; with ZeRO-1 a share of all but the weights."""
    moved = moved_bytes(TINY, TRAINED[recipe], copies=copies, zero=zero)
    assert moved == per_parameter * TINY.expert_parameters
