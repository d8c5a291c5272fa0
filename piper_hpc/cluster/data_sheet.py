"""The calibration of a cluster without measurements, from published figures of its devices and links."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from piper_hpc.cluster import accelerator
from piper_hpc.config.schema import ClusterConfig, DataSheetConfig
from piper_hpc.spec import DATA_SHEET, Calibration, Curve, Link, Topology

ASSUMED = "assumed"
"""How the source of a value begins that nobody published."""


class UnknownFact(ValueError):
    """A fact that the model needs and nobody published; `example` is an override that gives it, of a likely size."""

    def __init__(self, key: str, of_what: str, example: str) -> None:
        super().__init__(f"data_sheet.{key} is not public{of_what}, and predictions need it: give your own figure")
        self.example = f"cluster.data_sheet.{key}={example}, or what you know it to be"


def calibration_of_cluster(cluster: ClusterConfig, dtype: str) -> Calibration | None:
    """The calibration that a cluster's data sheet and its accelerator's make for matrix products of `dtype`.

    None where it has neither. Raises UnknownFact for one that is null, ValueError for one that makes no sense.
    """
    if cluster.data_sheet is None and cluster.accelerator is None:
        return None
    sheet = cluster.data_sheet or DataSheetConfig()
    peak_flops, efficiency, memory_bytes_per_s = sheet.peak_flops, sheet.gemm_efficiency, sheet.memory_bytes_per_s
    notes = {key: source for key, source in cluster.sources.items() if source.startswith(ASSUMED)}
    if cluster.accelerator is not None:
        device = accelerator.facts(cluster.accelerator)
        best = device.mamf_flops.get(dtype)
        if peak_flops is None:
            peak_flops = device.peak_flops.get(dtype)
        if memory_bytes_per_s is None:
            memory_bytes_per_s = device.memory_bytes_per_s
        if efficiency is None and best and peak_flops:
            efficiency = best / peak_flops
            notes["gemm_efficiency"] = f"the best measured matrix product: {device.mamf_source(dtype)}"
    if peak_flops is None:
        raise UnknownFact("peak_flops", f" for {cluster.accelerator} in {dtype}", "3e14")
    if memory_bytes_per_s is None:
        raise UnknownFact("memory_bytes_per_s", f" for {cluster.accelerator}", "1.5e12")
    for tier in set(sheet.links) - set(links_of(cluster)):
        fact, example = ("latency_s", "1e-5") if sheet.links[tier].latency_s is None else ("bytes_per_s", "1e10")
        raise UnknownFact(f"links.{tier}.{fact}", "", example)
    if efficiency is None:
        efficiency, notes["gemm_efficiency"] = 1.0, f"{ASSUMED}: the peak itself, as no share of it is published"
    return calibration(
        peak_flops=peak_flops,
        gemm_efficiency=efficiency,
        memory_bytes_per_s=memory_bytes_per_s,
        links={tier: (link.latency_s, link.bytes_per_s) for tier, link in links_of(cluster).items()},
        host_op_s=sheet.host_op_s or 0.0,
        provenance=notes,
    )


def links_of(cluster: ClusterConfig) -> dict[str, Link]:
    """The links of a cluster's data sheet by tier, without those that are not public."""
    links = cluster.data_sheet.links if cluster.data_sheet else {}
    return {
        tier: Link(link.latency_s, link.bytes_per_s)
        for tier, link in links.items()
        if link.latency_s is not None and link.bytes_per_s is not None
    }


def topology_of(cluster: ClusterConfig) -> Topology | None:
    """The domains of a uniform machine in ranks; None where its nodes and racks are all that is known."""
    if cluster.topology is None or cluster.racks is not None:
        return None
    domains, host = cluster.topology, cluster.ranks_per_node
    node = host * domains.hosts_per_node
    return Topology(
        node=node,
        pair=domains.ranks_per_pair,
        switch=domains.nodes_per_switch and node * domains.nodes_per_switch,
        rack=domains.nodes_per_rack and node * domains.nodes_per_rack,
        nics_per_node=domains.nics_per_node,
        ranks_per_nic=domains.nics_per_node and max(1, host // domains.nics_per_node),
    )


def calibration(
    *,
    peak_flops: float,
    memory_bytes_per_s: float,
    links: Mapping[str, tuple[float, float]],
    gemm_efficiency: float = 1.0,
    host_op_s: float = 0.0,
    provenance: Mapping[str, str] | None = None,
) -> Calibration:
    """Curves of ideal devices and links: seconds = latency + work / rate (the alpha-beta model for links).

    peak_flops: FLOP/s of one rank's device; gemm_efficiency: the share of it that matrix products reach, 0 < x <= 1;
    memory_bytes_per_s: of its memory; links: tier (see spec.Tier) -> (latency in s, bytes per second of one rank
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
        "gemm": _alpha_beta_curve("gemm", "flops", host_op_s, gemm_rate),
        "elementwise": _alpha_beta_curve("elementwise", "bytes", host_op_s, memory_bytes_per_s),
        "host_op": _alpha_beta_curve("host_op", "operations", 0.0, 1 / host_op_s) if host_op_s > 0 else None,
        **{
            f"p2p/{tier}": _alpha_beta_curve(f"p2p/{tier}", "bytes", latency_s, rate)
            for tier, (latency_s, rate) in links.items()
        },
    }
    return Calibration(
        source=DATA_SHEET,
        measured_at="",
        peak_flops=peak_flops,
        curves={name: curve for name, curve in curves.items() if curve is not None},
        provenance=dict(provenance or {}),
    )


def _alpha_beta_curve(operator: str, unit: str, latency_s: float, rate: float) -> Curve:
    """latency + work / rate, at four points a decade from 1 to 1e16 units of work."""
    points = tuple(float(work) for work in np.logspace(0, 16, 65))
    return Curve(operator, unit, points, tuple(latency_s + work / rate for work in points), ())
