"""Fitted coefficients of measured operators (latency, seconds per byte or FLOP, ...), with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A fitted number, not negative, and the ends of its 90 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """Seconds of one operator as a sum of non-negative terms, over the range of work that was measured.

    A collective or message has `latency_s` and `s_per_byte` (alpha and beta), once for each range of message sizes; a
    chain of small operations `start_s` and `s_per_operation`; a matrix product [m, k] x [k, n] `start_s`, `s_per_flop`,
    and the seconds that an element of the weight (k n), of the input (m k) and of the output (m n) adds: its efficiency
    over shape.
    backend: what carried it out, `torch` or another library; unit, least, most: of the work, ends included;
    points: measured points used; error: their median absolute error over their time, dimensionless.
    """

    operator: str
    backend: str
    terms: dict[str, Estimate]
    unit: str
    least: float
    most: float
    points: int
    error: float
