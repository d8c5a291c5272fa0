"""A cluster on which nothing was measured, described by its published figures; the prediction says so."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from piper_hpc.spec import DATA_SHEET, Calibration, Curve


def calibration(
    *,
    peak_flops: float,
    memory_bytes_per_s: float,
    links: Mapping[str, tuple[float, float]],
    gemm_efficiency: float = 1.0,
    host_op_s: float = 0.0,
    provenance: Mapping[str, str] | None = None,
) -> Calibration:
    """Curves of ideal devices and links: one rate, and a latency where there is one.

    peak_flops: FLOP/s of one rank's device; gemm_efficiency: the share of it that matrix products reach, 0 < x <= 1;
    memory_bytes_per_s: of its memory; links: tier (node, rack, system) -> (latency in s, bytes per second of one rank
    while all ranks of a node send); host_op_s: seconds to launch one operation. Such curves have no spread.
    Raises ValueError for a rate that is not above zero.
    """
    rates = {
        "peak_flops": peak_flops,
        "gemm_efficiency": gemm_efficiency,
        "memory_bytes_per_s": memory_bytes_per_s,
        **{f"links.{tier}.bytes_per_s": rate for tier, (_, rate) in links.items()},
    }
    for name, rate in rates.items():
        if rate <= 0:
            raise ValueError(f"data_sheet.{name}={rate}: must be above 0, as the vendor's data sheet states it")
    if gemm_efficiency > 1:
        raise ValueError(f"data_sheet.gemm_efficiency={gemm_efficiency}: is a share of the peak, at most 1")
    gemm_rate = peak_flops * gemm_efficiency
    curves = {
        "gemm": _line("gemm", "flops", host_op_s, gemm_rate),
        "elementwise": _line("elementwise", "bytes", host_op_s, memory_bytes_per_s),
        "host_op": _line("host_op", "operations", 0.0, 1 / host_op_s) if host_op_s > 0 else None,
        **{f"p2p/{tier}": _line(f"p2p/{tier}", "bytes", latency_s, rate) for tier, (latency_s, rate) in links.items()},
    }
    return Calibration(
        source=DATA_SHEET,
        measured_at="",
        peak_flops=peak_flops,
        curves={name: curve for name, curve in curves.items() if curve is not None},
        provenance=dict(provenance or {}),
    )


def _line(operator: str, unit: str, latency_s: float, rate: float) -> Curve:
    """latency + work / rate, at four points a decade from 1 to 1e16 units of work."""
    points = tuple(float(work) for work in np.logspace(0, 16, 65))
    return Curve(operator, unit, points, tuple(latency_s + work / rate for work in points), ())
