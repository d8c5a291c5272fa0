"""Fits recover what measured seconds were made of, within their intervals, and are not led astray by outliers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from piper_hpc.cluster.fits import fit_rows

SIZES = [1024.0 * 4**power for power in range(9)]


def row(operator: str, work: float, seconds: float, draw: np.random.Generator, **changes: Any) -> dict[str, Any]:
    """A row whose 20 repeats are up to some per cent slower than `seconds`."""
    samples = seconds * (1 + 0.02 * np.abs(draw.standard_normal(20)))
    return {
        "operator": operator,
        "cell": f"{operator}/{work}",
        "work": work,
        "unit": "bytes",
        "shape": {},
        "median_s": float(np.median(samples)),
        "p5_s": float(samples.min()),
        "p95_s": float(samples.max()),
        "n": 20,
        "samples_s": samples.tolist(),
    } | changes


@pytest.fixture
def draw() -> np.random.Generator:
    return np.random.default_rng(3)


def test_latency_and_rate_are_recovered_within_their_intervals(draw: np.random.Generator) -> None:
    (fit,) = fit_rows([row("p2p/node", size, 20e-6 + size / 2e9, draw) for size in SIZES])
    latency, per_byte = fit.terms["latency_s"], fit.terms["s_per_byte"]
    # Repeats are 1.35 % above the least in the median.
    assert latency.value == pytest.approx(20e-6, rel=0.05) and per_byte.value == pytest.approx(1 / 2e9, rel=0.05)
    assert latency.low <= 1.0135 * 20e-6 <= latency.high
    assert latency.low <= latency.value <= latency.high and latency.high - latency.low < 0.2 * latency.value
    assert per_byte.low <= per_byte.value <= per_byte.high
    assert (fit.least, fit.most, fit.points, fit.backend) == (SIZES[0], SIZES[-1], len(SIZES), "torch")
    assert fit.error < 0.02


def test_one_wild_point_does_not_move_the_line(draw: np.random.Generator) -> None:
    rows = [row("p2p/node", size, 20e-6 + size / 2e9, draw) for size in SIZES]
    rows[2] = row("p2p/node", SIZES[2], 10 * (20e-6 + SIZES[2] / 2e9), draw)
    (fit,) = fit_rows(rows)
    assert fit.terms["latency_s"].value == pytest.approx(20e-6, rel=0.1)
    assert fit.terms["s_per_byte"].value == pytest.approx(1 / 2e9, rel=0.1)


def test_a_change_of_protocol_splits_the_message_range(draw: np.random.Generator) -> None:
    def seconds(size: float) -> float:
        return 20e-6 + size / 1e9 if size < 1e5 else 300e-6 + size / 1e10

    near, far = fit_rows([row("p2p/rack", size, seconds(size), draw) for size in SIZES])
    assert near.most < 1e5 < far.least
    assert near.terms["latency_s"].value == pytest.approx(20e-6, rel=0.1)
    assert far.terms["latency_s"].value == pytest.approx(300e-6, rel=0.1)
    assert far.terms["s_per_byte"].value == pytest.approx(1e-10, rel=0.1)


def test_a_matrix_product_s_efficiency_over_shape(draw: np.random.Generator) -> None:
    def seconds(m: int, n: int, k: int) -> float:
        return 1e-5 + 2.0 * m * n * k / 1e13 + 2e-12 * n * k

    rows = [
        row("gemm", 2.0 * m * n * k, seconds(m, n, k), draw, unit="flops", shape={"m": m, "n": n, "k": k}, part="head")
        for m in (16, 128, 1024, 8192)
        for n, k in ((1024, 1024), (4096, 1024), (1024, 4096))
    ]
    (fit,) = fit_rows(rows)
    assert fit.terms["s_per_flop"].value == pytest.approx(1e-13, rel=0.05)
    assert fit.terms["s_per_weight"].value == pytest.approx(2e-12, rel=0.1)  # what the skinny region is bound by
    assert all(term.value >= 0 for term in fit.terms.values())


def test_back_ends_are_fitted_apart_and_a_few_sizes_not_at_all(draw: np.random.Generator) -> None:
    rows = [row("all_to_all/node/2", size, 1e-5 + size / 1e9, draw) for size in SIZES]
    rows += [row("all_to_all/node/2", size, 1e-6 + size / 4e9, draw, backend="mpi") for size in SIZES]
    rows += [row("all_gather/node/2", size, 1e-5 + size / 1e9, draw) for size in SIZES[:2]]
    fits = {(fit.backend, fit.operator): fit for fit in fit_rows(rows)}
    assert set(fits) == {("torch", "all_to_all/node/2"), ("mpi", "all_to_all/node/2")}
    assert fits["mpi", "all_to_all/node/2"].terms["s_per_byte"].value == pytest.approx(2.5e-10, rel=0.05)


def test_a_calibration_s_few_points_tell_no_interval_but_host_time(draw: np.random.Generator) -> None:
    def short(operator: str, work: float, seconds: float) -> dict[str, Any]:
        full = row(operator, work, seconds, draw)
        return {key: value for key, value in full.items() if key not in ("cell", "samples_s")}

    rows = [short("p2p/node", size, 1e-5 + size / 1e9) for size in SIZES]
    rows += [short("host_op", count, 4e-6 * count) for count in (64.0, 256.0, 1024.0)]
    (fit,) = fit_rows(rows)
    assert fit.operator == "host_op"
    assert fit.terms["s_per_operation"].value == pytest.approx(4e-6, rel=0.1)
