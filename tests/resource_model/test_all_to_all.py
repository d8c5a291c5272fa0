"""The all-to-all family: its published shares and times, what no algorithm may do, and who wins when."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.all_to_all import AllToAllCost, AllToAllRouting, all_to_all, dedup_ratio
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.topology import Group, Links, group, tier_links
from piper_hpc.spec import ALGORITHMS, Link, Topology

NODES_OF_8 = Topology(node=8)
FRONTIER = Topology(node=8, pair=2, switch=32)
MI250X = tier_links({"node": Link(3e-6, 50e9), "system": Link(10e-6, 12.5e9)})
H100 = tier_links({"node": Link(3e-6, 450e9), "system": Link(10e-6, 50e9)})
COPY_S_PER_BYTE = 1e-12
TOKENS, TOP_K, HIDDEN = 4096, 8, 4096
DEEPSEEK = AllToAllRouting(experts=256, top_k=TOP_K)


def exchange(algorithm: str, links: Links, ranks: int, phases: str = "merged", **other: object) -> AllToAllCost:
    return all_to_all(
        algorithm, group(NODES_OF_8, ranks), links, TOKENS * TOP_K, 2 * HIDDEN, DEEPSEEK,
        copy_s_per_byte=COPY_S_PER_BYTE, metadata_bytes=0, phases=phases, **other,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("experts", "top_k", "shares"),
    [
        (256, 8, (0.249, 0.452, 0.662, 0.815, 0.908, 0.960)),
        (384, 8, (0.249, 0.451, 0.660, 0.812, 0.905, 0.955)),
        (128, 8, (0.249, 0.454, 0.667, 0.825, 0.920, 0.972)),
        (160, 6, (0.329, 0.552, 0.743, 0.868, 0.939)),
        (64, 6, (0.329, 0.558, 0.756, 0.886, 0.960, 1.0)),
        (64, 2, (0.754, 0.881, 0.944, 0.976, 0.992, 1.0)),
        (8, 2, (0.786, 0.929, 1.0)),
    ],
)
def test_deduplicated_shares_are_those_of_the_table(experts: int, top_k: int, shares: tuple[float, ...]) -> None:
    nodes = 2 ** np.arange(1, len(shares) + 1)
    assert dedup_ratio(nodes, AllToAllRouting(experts, top_k)) == pytest.approx(shares, abs=6e-4)


def test_redundancy_that_x_moe_prints() -> None:
    assert 1 - dedup_ratio(4, DEEPSEEK) == pytest.approx(0.548, abs=5e-4)
    assert 1 - dedup_ratio(2, DEEPSEEK) == pytest.approx(0.751, abs=5e-4)
    assert dedup_ratio(2, AllToAllRouting(32, 8)) == pytest.approx(0.2497, abs=5e-5)


@given(st.sampled_from([8, 60, 64, 160, 256]), st.integers(1, 8), st.integers(0, 8))
def test_deduplicated_shares_are_the_binomials(experts: int, top_k: int, power: int) -> None:
    nodes = 2**power
    if experts % nodes:
        return
    exact = nodes * (1 - comb(experts - experts // nodes, top_k) / comb(experts, top_k)) / top_k
    assert dedup_ratio(nodes, AllToAllRouting(experts, top_k)) == pytest.approx(exact, rel=1e-12)
    equal = AllToAllRouting(experts, top_k, shares=(1 / experts,) * experts)
    assert dedup_ratio(nodes, equal) == pytest.approx(exact, rel=1e-9)


def test_group_limited_routing_bounds_the_share_by_the_groups_a_token_reaches() -> None:
    limited = AllToAllRouting(256, 8, groups=8, groups_per_token=4)
    assert dedup_ratio(8, limited) == 0.5
    assert dedup_ratio(4, limited) == pytest.approx(dedup_ratio(4, DEEPSEEK))  # four nodes a token reaches anyway
    assert dedup_ratio(16, limited) == pytest.approx(dedup_ratio(16, DEEPSEEK))  # four groups are eight nodes


def test_skewed_shares_are_near_what_drawing_without_replacement_gives() -> None:
    shares = np.linspace(3.0, 0.5, 64)
    shares /= shares.sum()
    draws = np.random.default_rng(0).gumbel(size=(20_000, 64)) + np.log(shares)
    chosen = np.argsort(-draws, axis=1)[:, :6] // 16  # the node of each expert, of four
    counted = np.mean([len(set(row)) for row in chosen.tolist()]) / 6
    measured = dedup_ratio(4, AllToAllRouting(64, 6, shares=tuple(shares)))
    assert measured == pytest.approx(counted, rel=0.02)
    assert measured < dedup_ratio(4, AllToAllRouting(64, 6))


@pytest.mark.parametrize(
    ("links", "ranks", "flat", "two_level", "halo", "dedup"),
    [
        (MI250X, 16, 13.2, 16.0, 13.7, 7.9),
        (MI250X, 32, 17.5, 21.4, 20.2, 12.6),
        (MI250X, 64, 20.0, 24.1, 23.5, 17.8),
        (MI250X, 256, 23.5, 26.4, 26.2, 24.5),
        (H100, 32, 4.4, 5.1, 5.0, 2.9),
        (H100, 64, 5.3, 5.9, 5.8, 4.3),
        (H100, 256, 7.7, 6.6, 6.6, 6.1),
    ],
)
def test_times_of_one_exchange_in_ms(
    links: Links, ranks: int, flat: float, two_level: float, halo: float, dedup: float
) -> None:
    assert 1e3 * exchange("flat", links, ranks).seconds == pytest.approx(flat, abs=0.055)
    assert 1e3 * exchange("halo", links, ranks).seconds == pytest.approx(two_level, abs=0.055)
    assert 1e3 * exchange("halo", links, ranks, "overlapped").seconds == pytest.approx(halo, abs=0.055)
    assert 1e3 * exchange("halo_dedup", links, ranks).seconds == pytest.approx(dedup, abs=0.055)


@pytest.mark.parametrize(
    ("links", "ratios"),
    [(MI250X, (6.7, 3.8, 1.95, 1.14, 0.89, 0.83)), (H100, (7.0, 5.8, 3.9, 2.0, 1.18, 0.92))],
)
def test_flat_over_two_levels_by_pair_size(links: Links, ratios: tuple[float, ...]) -> None:
    pair_bytes = 1024.0 * np.array([1, 16, 64, 256, 1024, 4096])
    where = group(NODES_OF_8, 128)
    flat, two_level = (
        all_to_all(name, where, links, 128, pair_bytes, DEEPSEEK, copy_s_per_byte=COPY_S_PER_BYTE, phases="merged")
        for name in ("flat", "halo")
    )
    assert flat.seconds / two_level.seconds == pytest.approx(ratios, rel=0.04)


@pytest.mark.parametrize(("links", "near_rate", "crossover"), [(MI250X, 50e9, 0.45e6), (H100, 450e9, 2.1e6)])
def test_two_levels_and_flat_cost_the_same_at_the_crossover(links: Links, near_rate: float, crossover: float) -> None:
    pair_bytes = 10e-6 / (1 / near_rate + 2 * COPY_S_PER_BYTE * (8 / 7) * (16 / 15))
    assert pair_bytes == pytest.approx(crossover, rel=0.03)
    where = group(NODES_OF_8, 128)
    sizes = pair_bytes * np.array([0.9, 1.0, 1.1])
    flat, two_level = (
        all_to_all(name, where, links, 128, sizes, DEEPSEEK, copy_s_per_byte=COPY_S_PER_BYTE, phases="merged").seconds
        for name in ("flat", "halo")
    )
    assert two_level[0] < flat[0] and two_level[2] > flat[2]
    assert two_level[1] == pytest.approx(flat[1], rel=1e-9)


@pytest.mark.parametrize(("links", "bound"), [(MI250X, 0.75), (H100, 0.79)])
def test_dedup_wins_at_every_size_below_its_bound(links: Links, bound: float) -> None:
    near, far = links.s_per_byte[1], links.s_per_byte[4]
    share = 1 - (7 * near + 2 * COPY_S_PER_BYTE * 8 * 16 / 15) / (8 * far)
    assert share == pytest.approx(bound, abs=0.01)
    where, rows = group(NODES_OF_8, 128), 1e9  # so many bytes that latency does not count
    for experts_per_token, wins in ((8, dedup_ratio(16, DEEPSEEK) < share), (64, True)):
        routing = AllToAllRouting(256, experts_per_token)
        found = all_to_all("halo_dedup", where, links, rows, 8192, routing, copy_s_per_byte=COPY_S_PER_BYTE,
                           metadata_bytes=0, phases="merged").seconds  # fmt: skip
        assert (found < all_to_all("flat", where, links, rows, 8192, routing).seconds) == wins


def test_three_levels_are_the_sum_over_levels() -> None:
    # Section of the formula: sum of (n - 1) a + B (1 - 1/n) b r, + 2 B g for each level beyond the first.
    links = tier_links({"node": Link(1e-6, 40e9), "switch": Link(5e-6, 20e9), "system": Link(2e-5, 10e9)})
    buffer_bytes = TOKENS * TOP_K * 2.0 * HIDDEN
    levels = (
        (8, 1e-6, 40e9, 1.0),
        (4, 5e-6, 20e9, dedup_ratio(16, DEEPSEEK)),
        (4, 2e-5, 10e9, dedup_ratio(4, DEEPSEEK)),
    )
    plain = all_to_all("halo3", group(Topology(8, switch=32), 128), links, TOKENS * TOP_K, 2 * HIDDEN, DEEPSEEK,
                       copy_s_per_byte=1e-12, phases="merged")  # fmt: skip
    dedup = all_to_all("halo3_dedup", group(Topology(8, switch=32), 128), links, TOKENS * TOP_K, 2 * HIDDEN, DEEPSEEK,
                       copy_s_per_byte=1e-12, phases="merged", metadata_bytes=0)  # fmt: skip
    copies = 4 * buffer_bytes * 1e-12
    assert plain.seconds == pytest.approx(copies + sum((n - 1) * (a + buffer_bytes / n / b) for n, a, b, _ in levels))
    assert dedup.seconds == pytest.approx(
        copies + sum((n - 1) * (a + buffer_bytes / n / b * r) for n, a, b, r in levels)
    )
    assert plain.messages == (0, 7, 3, 0, 3)


group_sizes = st.integers(0, 9).map(lambda power: 2**power)
imbalances = st.floats(1.0, 8.0)


@given(st.sampled_from(list(ALGORITHMS)), group_sizes, group_sizes, st.floats(1.0, 1e6), imbalances)
def test_what_no_algorithm_may_do(algorithm: str, size: int, stride: int, rows: float, imbalance: float) -> None:
    where = group(FRONTIER, size, stride)
    routing = AllToAllRouting(512, 8, imbalance=imbalance)
    found = all_to_all(algorithm, where, MI250X, rows, 8192, routing, copy_s_per_byte=1e-12)
    flat = all_to_all("flat", where, MI250X, rows, 8192, routing)
    # Beyond a node no algorithm sends more rows or messages than flat does, and those without dedup as many rows.
    away, flat_away = sum(found.rows[2:]), sum(flat.rows[2:])
    if "halo3" not in algorithm:
        assert away <= flat_away * (1 + 1e-9)
    assert sum(found.messages[2:]) <= sum(flat.messages[2:]) * (1 + 1e-9)
    if algorithm == "halo":
        assert away == pytest.approx(flat_away)
    # Beyond the switch three levels send no more than flat either.
    assert sum(found.rows[3:]) <= sum(flat.rows[3:]) * (1 + 1e-9)
    if algorithm == "halo3":
        assert sum(found.rows[3:]) == pytest.approx(sum(flat.rows[3:]))
    # In one node every algorithm is flat, but for rows that several experts of a rank share.
    if where.within(1) == size:
        assert away == 0
        assert algorithm == "flat_dedup" or found.seconds == pytest.approx(flat.seconds)
    assert found.payload_bytes == pytest.approx(tuple(8192 * sent for sent in found.rows))
    assert sum(flat.rows) == pytest.approx(rows * (size - 1) / size)
    assert found.hidden_s >= 0 and min(found.rows) >= 0


@given(st.sampled_from([*ALGORITHMS, "auto"]), group_sizes, st.floats(1.0, 1e6), st.floats(1.0, 10.0), imbalances)
def test_more_bytes_and_more_imbalance_never_take_less_time(
    algorithm: str, size: int, rows: float, factor: float, imbalance: float
) -> None:
    def seconds(rows: float, imbalance: float) -> float:
        where = group(FRONTIER, size)
        return float(
            all_to_all(algorithm, where, MI250X, rows, 8192, AllToAllRouting(512, 8, imbalance=imbalance)).seconds
        )

    assert seconds(rows * factor, imbalance) >= seconds(rows, imbalance) * (1 - 1e-12)
    assert seconds(rows, imbalance) >= seconds(rows, 1.0) * (1 - 1e-12)


def test_the_hot_rank_sets_the_time_of_what_feeds_it() -> None:
    def seconds(algorithm: str, imbalance: float) -> float:
        where = group(NODES_OF_8, 64)
        routing = AllToAllRouting(256, 8, imbalance=imbalance)
        free = tier_links({"node": Link(0, 1e30), "system": Link(0, 12.5e9)})
        return float(all_to_all(algorithm, where, free, 1e5, 8192, routing).seconds)

    assert seconds("flat", 2.0) == pytest.approx(2 * seconds("flat", 1.0))
    # Between nodes the load of the hot rank is that of its node: (2 + 7 * 62/63) / 8.
    assert seconds("halo", 2.0) == pytest.approx((2 + 7 * 62 / 63) / 8 * seconds("halo", 1.0))
    assert seconds("flat", 1e9) == pytest.approx(64 * seconds("flat", 1.0))  # one rank cannot receive more than all


def test_auto_is_the_cheapest_at_every_point_of_a_grid() -> None:
    ep = 2 ** np.arange(9)
    rows = np.array([[16.0], [1e3], [1e5]])
    where = group(FRONTIER, ep)
    options = {n: all_to_all(n, where, MI250X, rows, 8192, DEEPSEEK, copy_s_per_byte=1e-12) for n in ALGORITHMS}
    auto = all_to_all("auto", where, MI250X, rows, 8192, DEEPSEEK, copy_s_per_byte=1e-12)
    assert auto.seconds == pytest.approx(np.min([o.seconds for o in options.values()], axis=0))
    assert len(np.unique(auto.algorithm)) > 2
    for row in range(3):
        for column in range(9):
            chosen = options[list(ALGORITHMS)[auto.algorithm[row, column]]]
            assert auto.seconds[row, column] == np.broadcast_to(chosen.seconds, (3, 9))[row, column]
            assert auto.rows[4][row, column] == np.broadcast_to(chosen.rows[4], (3, 9))[row, column]
            alone = all_to_all("auto", group(FRONTIER, int(ep[column])), MI250X, float(rows[row, 0]), 8192, DEEPSEEK,
                               copy_s_per_byte=1e-12)  # fmt: skip
            assert alone.seconds == pytest.approx(auto.seconds[row, column])
    plain = all_to_all("auto", where, MI250X, rows, 8192, DEEPSEEK, among=("flat", "halo"))
    assert set(np.unique(plain.algorithm)) <= {0, 1}


def test_a_group_of_one_sends_nothing() -> None:
    for algorithm in (*ALGORITHMS, "auto"):
        found = all_to_all(algorithm, Group(), MI250X, 1e6, 8192, DEEPSEEK, copy_s_per_byte=1e-12)
        assert found.seconds == 0 and sum(found.rows) == 0


def test_unknown_algorithms_and_shares_are_refused() -> None:
    with pytest.raises(ResourceModelError, match="all_to_all=bruck: must be one of flat, halo"):
        all_to_all("bruck", Group(), MI250X, 1, 1, DEEPSEEK)
    with pytest.raises(ResourceModelError, match="must be 256 popularities"):
        dedup_ratio(4, AllToAllRouting(256, 8, shares=(1.0,)))
