"""Robust fits of measured seconds, with confidence intervals: latency and rate of links, host time, GEMM efficiency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from piper_hpc.spec import Estimate, Fit

CONFIDENCE = 0.90
REPLICATES = 200
HUBER = 1.345
"""Residuals beyond this many standard deviations weigh less (Huber 1964): 95 % efficient where errors are normal."""
REWEIGHTINGS = 6
LEAST_POINTS = {2: 3, 5: 10}
"""Different sizes or shapes that a fit of so many terms needs."""
RANGE_POINTS = 3
"""A message range has at least so many sizes."""
SPLIT_GAIN = 0.5
"""Two ranges are told apart where they leave less than this share of the error that one line leaves,"""
SPLIT_ERROR = 0.05
"""and where one line is wrong by more than this."""

Row = Mapping[str, Any]
Features = Callable[[Row], list[float]]

_FEATURES: dict[str, tuple[tuple[str, ...], Features]] = {
    "gemm": (
        ("start_s", "s_per_flop", "s_per_weight", "s_per_input", "s_per_output"),
        lambda row: [1.0, row["work"], *_products(row["shape"]["k"], row["shape"]["n"], row["shape"]["m"])],
    ),
    "grouped_gemm": (
        ("start_s", "s_per_flop", "s_per_weight", "s_per_input", "s_per_output"),
        lambda row: [1.0, row["work"], *_grouped(**row["shape"])],
    ),
    "host_op": (("start_s", "s_per_operation"), lambda row: [1.0, row["work"]]),
}
EXCHANGES = ("p2p", "p2p_concurrent", "all_to_all", "all_reduce", "reduce_scatter", "all_gather")
_EXCHANGE = (("latency_s", "s_per_byte"), lambda row: [1.0, row["work"]])


def _products(k: int, n: int, m: int) -> list[float]:
    return [float(k * n), float(m * k), float(m * n)]


def _grouped(experts: int, tokens: int, hidden: int, ffn: int) -> list[float]:
    return [float(experts * hidden * ffn), float(tokens * hidden), float(tokens * ffn)]


def fit_rows(rows: Iterable[Row], *, seed: int = 0) -> tuple[Fit, ...]:
    """Every fit that the rows allow: of host time, and of what the wide suites measured at enough sizes or shapes.

    rows: of `measurements.jsonl`, right and not refused; those of the wide suites name their `cell`, and the few of a
    calibration suite are too few for an interval. Deterministic: replicates are drawn from `seed`.
    """
    series: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if "cell" in row or row["operator"] == "host_op":
            series[str(row.get("backend", "torch")), str(row["operator"])].append(row)
    found: list[Fit] = []
    for (backend, operator), points in sorted(series.items()):
        exchange = operator.split("/")[0] in EXCHANGES
        if not exchange and operator not in _FEATURES:
            continue
        names, features = _EXCHANGE if exchange else _FEATURES[operator]
        ordered = sorted(points, key=lambda row: float(row["work"]))
        for part in _ranges(ordered, features) if exchange else [ordered]:
            if len({tuple(features(row)) for row in part}) >= LEAST_POINTS[len(names)]:
                found.append(_fit(operator, backend, names, features, part, np.random.default_rng(seed)))
    return tuple(found)


def _ranges(points: Sequence[Row], features: Features) -> list[Sequence[Row]]:
    """The points, split in two ranges of sizes where a library changes its protocol between them."""
    whole = _relative_error(points, features)
    best, split = whole, None
    for cut in range(RANGE_POINTS, len(points) - RANGE_POINTS + 1):
        near, far = points[:cut], points[cut:]
        shares = ((near, len(near)), (far, len(far)))
        error = sum(_relative_error(part, features) * count for part, count in shares) / len(points)
        if error < best:
            best, split = error, cut
    if split is None or whole < SPLIT_ERROR or best > SPLIT_GAIN * whole:
        return [points]
    return [points[:split], points[split:]]


def _relative_error(points: Sequence[Row], features: Features) -> float:
    matrix, seconds = _arrays(points, features)
    return float(np.abs(matrix @ solve(matrix, seconds) / seconds - 1).mean())


def _arrays(points: Sequence[Row], features: Features) -> tuple[np.ndarray, np.ndarray]:
    return np.array([features(row) for row in points]), np.array([float(row["median_s"]) for row in points])


def solve(matrix: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Coefficients, none negative, of `matrix` [points, terms] for `seconds` [points]: least relative error, with
    Huber's weights for outliers (Huber 1964), by iteratively reweighted non-negative least squares (scipy's nnls)."""
    from scipy.optimize import nnls  # a third of a second, which a launch that fits nothing is spared

    relative = matrix / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    relative = relative / scale  # columns of like size: seconds and FLOPs are 15 orders of magnitude apart
    weights = np.ones(len(seconds))
    coefficients = np.zeros(matrix.shape[1])
    for _ in range(REWEIGHTINGS):
        root = np.sqrt(weights)
        coefficients, _ = nnls(relative * root[:, None], root)
        residuals = np.abs(relative @ coefficients - 1)
        deviation = max(1.4826 * float(np.median(residuals)), 1e-9)  # of normal errors, from their median
        updated = np.minimum(1.0, HUBER * deviation / np.maximum(residuals, 1e-12))
        if np.allclose(updated, weights, atol=1e-3):
            break
        weights = updated
    return np.asarray(coefficients / scale)


def _fit(
    operator: str,
    backend: str,
    names: Sequence[str],
    features: Features,
    points: Sequence[Row],
    draw: np.random.Generator,
) -> Fit:
    matrix, seconds = _arrays(points, features)
    coefficients = solve(matrix, seconds)
    replicates = np.array([_replicate(matrix, points, draw) for _ in range(REPLICATES)])
    low, high = np.percentile(replicates, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
    return Fit(
        operator=operator,
        backend=backend,
        terms={
            # An estimate at the edge of what replicates say belongs to its interval all the same.
            name: Estimate(float(value), float(min(value, below)), float(max(value, above)))
            for name, value, below, above in zip(names, coefficients, low, high, strict=True)
        },
        unit=str(points[0]["unit"]),
        least=float(points[0]["work"]),
        most=float(max(row["work"] for row in points)),
        points=len(points),
        error=float(np.median(np.abs(matrix @ coefficients / seconds - 1))),
    )


def _replicate(matrix: np.ndarray, points: Sequence[Row], draw: np.random.Generator) -> np.ndarray:
    """One bootstrap replicate of the coefficients, [terms]: points drawn again (a line may not fit them), each with its
    repeats drawn again."""
    chosen = draw.integers(len(points), size=len(points))
    if len({float(points[index]["work"]) for index in chosen}) < matrix.shape[1]:
        chosen = np.arange(len(points))  # too few different points to tell the terms apart
    seconds = np.array([_resampled_median(points[index], draw) for index in chosen])
    return solve(matrix[chosen], seconds)


def _resampled_median(row: Row, draw: np.random.Generator) -> float:
    """The median of a row's repeats drawn again: around the row's median, as its repeats are around theirs."""
    samples = row.get("samples_s")
    median = float(row["median_s"])
    if samples:
        again = np.median(draw.choice(samples, size=len(samples)))
        return float(median * again / np.median(samples))
    # Without repeats: normal, with the standard error that the 5-95 % range (3.29 deviations) gives a median.
    error = 1.2533 * (float(row["p95_s"]) - float(row["p5_s"])) / 3.29 / max(1, int(row.get("n", 1))) ** 0.5
    return max(0.1 * median, float(draw.normal(median, error)))
