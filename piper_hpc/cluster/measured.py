"""Measured constants of the analytical engine: shares of the peaks that kernels reach, and links, from a calibration.

A fit of the wide suites goes before the curve of the calibration suite: it tells latency, rate and the effect of depth
apart. What was not measured stays as the data sheet has it; every constant says which of the two it is from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from piper_hpc.cluster.fits import solve
from piper_hpc.spec import TIERS, Accelerator, Calibration, ClusterSpec, Curve, Efficiency, Fit, Link

FLASH_BACKWARD_FLOPS = 2.5
"""Products of an attention backward over its forward's, five against two (arXiv 2307.08691); a curve's work is the
forward's FLOPs."""

REFERENCE_DTYPE = "bfloat16"
"""What the shares of matrix products in conf/efficiency are of; those of another type say nothing of it."""


@dataclass(frozen=True)
class MeasuredConstant:
    """One measured constant, in the unit of its field of Efficiency or Link.

    spread: half of its 90 % interval over the value; source: operator and evidence.
    """

    value: float
    spread: float
    source: str


def with_measurements(cluster: ClusterSpec) -> ClusterSpec:
    """`cluster` with the links and the device efficiency that its calibration measured; as it is where none was.

    A device without a data sheet becomes one of measured rates alone. Shares of matrix products and attention are
    taken where they were measured in REFERENCE_DTYPE, or there is no data sheet; the memory's, the host's and the
    links' in any type.
    """
    calibration = cluster.calibration
    if not calibration.measured:
        return cluster
    links = {tier: found for tier in TIERS if (found := measured_link(calibration, tier)) is not None}
    return replace(
        cluster,
        links={**cluster.links, **{tier: link for tier, (link, _) in links.items()}},
        accelerator=_accelerator(cluster, links),
    )


def measured_link(calibration: Calibration, tier: str) -> tuple[Link, MeasuredConstant] | None:
    """What one rank gets of a tier's link, with its rate as a Constant (bytes/s); None where no message crossed it.

    From messages of all ranks at once where those were measured, else of one pair. The rate is that of the largest
    messages, the latency that of the smallest.
    """
    for operator in (f"p2p_concurrent/{tier}", f"p2p/{tier}"):
        fits = sorted(_fits(calibration, operator), key=lambda fit: fit.most)
        if fits and fits[-1].terms["s_per_byte"].value > 0:
            latency, per_byte = fits[0].terms["latency_s"].value, fits[-1].terms["s_per_byte"]
            spread = (per_byte.high - per_byte.low) / 2 / per_byte.value
            constant = MeasuredConstant(
                1 / per_byte.value, spread, _source(calibration, operator, f"{fits[-1].points} sizes")
            )
            return Link(latency, constant.value), constant
        curve = calibration.curves.get(operator)
        if curve is not None and len(curve.work) > 1:
            latency, slope = _line(curve)
            if slope > 0:
                constant = MeasuredConstant(
                    1 / slope, _spread(curve), _source(calibration, operator, f"{len(curve.work)} sizes")
                )
                return Link(latency, constant.value), constant
    return None


def _accelerator(cluster: ClusterSpec, links: Mapping[str, tuple[Link, MeasuredConstant]]) -> Accelerator | None:
    """The device with what was measured of it, and with no share left to take of a measured link."""
    calibration = cluster.calibration
    dtype = calibration.provenance.get("dtype", "float32")
    sheet = cluster.accelerator or _without_data_sheet(cluster, dtype)
    if sheet is None:
        return None
    known = dict(_rates(calibration, sheet))
    if sheet.published and dtype != REFERENCE_DTYPE:
        known = {name: constant for name, constant in known.items() if name in ("memory", "launch_s")}
    efficiency = sheet.efficiency
    shares, tied = _by_tier(efficiency)
    of_links = {tier: replace(constant, value=1.0) for tier, (_, constant) in links.items()}
    values: dict[str, Any] = {name: constant.value for name, constant in known.items()}
    constants = known | {f"link.{tier}": constant for tier, constant in of_links.items()}
    return replace(
        sheet,
        efficiency=replace(
            efficiency,
            **values,
            link=shares | {tier: constant.value for tier, constant in of_links.items()},
            spread={**efficiency.spread, **{name: constant.spread for name, constant in constants.items()}},
            sources={**efficiency.sources, **{name: constant.source for name, constant in constants.items()}},
            assumed={name: why for name, why in efficiency.assumed.items() if name not in constants},
            tied={name: other for name, other in tied.items() if not {name, other} & constants.keys()},
            measured=tuple(constants),
        ),
    )


def _by_tier(efficiency: Efficiency) -> tuple[dict[str, float], dict[str, str]]:
    """The link share of every tier by its own name, so that a measured one changes no other, and what is tied then."""
    if not efficiency.link:
        return {}, dict(efficiency.tied)
    wider = {"pair": "node", "switch": "system", "rack": "system"}
    tied = {f"link.{tier}": f"link.{wide}" for tier, wide in wider.items() if tier not in efficiency.link}
    return {tier: efficiency.link_share(tier) for tier in TIERS}, {**efficiency.tied, **tied}


def _without_data_sheet(cluster: ClusterSpec, dtype: str) -> Accelerator | None:
    """A device that measurements alone describe: its peaks are the best rates that were measured."""
    calibration = cluster.calibration
    moved = calibration.curves.get("elementwise")
    if moved is None or calibration.peak_flops <= 0:
        return None
    return Accelerator(
        name=f"{cluster.name}, as measured",
        peak_flops={dtype: calibration.peak_flops},
        memory_bytes=cluster.memory_bytes,
        memory_bytes_per_s=max(work / seconds for work, seconds in zip(moved.work, moved.seconds, strict=True)),
        compute_units=0,
        efficiency=Efficiency(gemm=1.0, grouped_gemm=1.0, attention_forward=1.0, attention_backward=1.0, memory=1.0),
        published=False,
    )


def _rates(calibration: Calibration, device: Accelerator) -> Iterator[tuple[str, MeasuredConstant]]:
    """Every constant of an Efficiency that the calibration measured, by name; shares are of the device's peaks."""
    dtype = calibration.provenance.get("dtype", "float32")
    peak = device.peak_flops.get(dtype) or device.peak_flops.get(REFERENCE_DTYPE)
    assert peak, "a device has a peak rate"
    for name in ("gemm", "grouped_gemm"):
        for fit in _fits(calibration, name):
            per_flop, per_output = fit.terms["s_per_flop"], fit.terms["s_per_output"]
            if per_flop.value > 0:
                source = _source(calibration, name, f"{fit.points} shapes")
                spread = (per_flop.high - per_flop.low) / 2 / per_flop.value
                yield name, MeasuredConstant(1 / per_flop.value / peak, spread, source)
                if name == "gemm":
                    # m n outputs that cost the same at any depth k: 2 m n k a + m n b = 2 m n k a (1 + b / (2 a) / k).
                    yield "gemm_edge", MeasuredConstant(per_output.value / per_flop.value / 2, spread, source)
                break
        else:
            yield from _best(calibration, name, name, peak)
    yield from _best(calibration, "attention_forward", "attention_forward", peak)
    yield from _best(calibration, "attention_backward", "attention_backward", peak / FLASH_BACKWARD_FLOPS)
    yield from _best(calibration, "memory", "elementwise", device.memory_bytes_per_s)
    for fit in _fits(calibration, "host_op"):
        launch = fit.terms["s_per_operation"]
        if launch.value > 0:
            # A measured operation is launched twice, in forward and in backward.
            spread = (launch.high - launch.low) / 2 / launch.value
            yield (
                "launch_s",
                MeasuredConstant(launch.value / 2, spread, _source(calibration, "host_op", f"{fit.points} chains")),
            )


def _best(calibration: Calibration, name: str, operator: str, peak: float) -> Iterator[tuple[str, MeasuredConstant]]:
    """The share of `peak` (work a second) at the point of an operator's curves where it is best."""
    rates: list[tuple[float, float]] = []
    for curve_name, curve in calibration.curves.items():
        if curve_name == operator or curve_name.startswith(f"{operator}/"):
            spreads = curve.spread or (0.0,) * len(curve.work)
            rates += [(w / s, spread) for w, s, spread in zip(curve.work, curve.seconds, spreads, strict=True)]
    if rates:
        rate, spread = max(rates)
        source = _source(calibration, operator, f"best of {len(rates)} sizes")
        yield name, MeasuredConstant(rate / peak, spread, source)


def _fits(calibration: Calibration, operator: str) -> list[Fit]:
    return [fit for fit in calibration.fits if fit.operator == operator and fit.backend == "torch"]


def _line(curve: Curve) -> tuple[float, float]:
    """Latency in s and seconds per unit of work of a curve, neither negative: least relative error, see fits.solve."""
    matrix = np.array([[1.0, work] for work in curve.work])
    latency, slope = solve(matrix, np.array(curve.seconds))
    return float(latency), float(slope)


def _spread(curve: Curve) -> float:
    return float(curve.spread[-1]) if curve.spread else 0.0


def _source(calibration: Calibration, operator: str, points: str) -> str:
    return f"measured: {operator}, {points}, {calibration.measured_at or 'undated'} ({calibration.source})"
