"""A cluster described by data sheets: ideal rates, no spread, and said to be so."""

from __future__ import annotations

from typing import Any

import pytest

from piper_hpc.cluster import data_sheet
from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.curves import seconds_at
from piper_hpc.spec import ClusterSpec, Layout, Workload
from tests.resource_model.clusters import TINY

FRONTIER: dict[str, Any] = {
    "peak_flops": 191.5e12,
    "gemm_efficiency": 0.6,
    "memory_bytes_per_s": 1.6e12,
    "host_op_s": 1e-5,
    "links": {"node": (1e-5, 50e9), "rack": (2e-5, 12.5e9), "system": (2e-5, 12.5e9)},
}


def test_a_link_costs_its_latency_and_its_bytes() -> None:
    curves = data_sheet.calibration(**FRONTIER).curves
    assert seconds_at(curves["p2p/node"], 8) == pytest.approx(1e-5, rel=1e-3)
    assert seconds_at(curves["p2p/rack"], 12.5e9) == pytest.approx(1.0, rel=1e-3)
    assert seconds_at(curves["gemm"], 0.6 * 191.5e12) == pytest.approx(1.0, rel=1e-3)


def test_a_prediction_names_the_data_sheet_and_gives_no_intervals() -> None:
    cluster = ClusterSpec("frontier", 2, 8, (0, 0), 64 * 10**9, data_sheet.calibration(**FRONTIER))
    prediction = predict(TINY, cluster, Layout(pp=2, ep=8, micro_batch=1), Workload(64, 128))
    assert prediction.calibration["source"] == "data sheet"
    assert prediction.calibration["peak_flops"] == 191.5e12
    assert prediction.intervals == {}
    assert 0 < prediction.mfu < 0.6


@pytest.mark.parametrize("key", ["peak_flops", "gemm_efficiency", "memory_bytes_per_s"])
def test_a_rate_of_zero_is_refused_by_name(key: str) -> None:
    with pytest.raises(ValueError, match=rf"data_sheet.{key}=0: must be above 0"):
        data_sheet.calibration(**(FRONTIER | {key: 0}))


def test_a_link_without_bandwidth_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"data_sheet.links.node.bytes_per_s=0: must be above 0"):
        data_sheet.calibration(**(FRONTIER | {"links": {"node": (1e-5, 0)}}))
