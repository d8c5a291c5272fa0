"""The testbed as a machine: its calibrations tell the quota that ranks are measured under."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piper_hpc.cluster import evidence, machine
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.spec import QUOTA_PERIOD_US, CpuQuota
from piper_hpc.testbed import state
from piper_hpc.testbed.state import Link, Node, Testbed
from tests.resource_model.clusters import calibration

BED = Testbed(
    schema_version=1,
    created="2026-01-01T00:00:00+00:00",
    slurm_conf="/x/slurm.conf",
    environment={},
    nodes=(Node("n1", "10.0.0.1", "rack1"),),
    ranks_per_node=2,
    cpu_share=0.2,
    period_us=QUOTA_PERIOD_US,
    memory_bytes=2**30,
    links={"nic": Link(50e6, 49.5e6)},
    options={},
)


@pytest.mark.parametrize("period_us", [QUOTA_PERIOD_US, 5_000])
def test_a_calibration_knows_the_quota_and_its_period(period_us: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "load", lambda: replace(BED, period_us=period_us))
    cluster = ClusterConfig(name="testbed", scheduler="slurm", nodes=1, ranks_per_node=2)
    facts = evidence.facts(machine.describe(cluster), cluster, "float32")
    measured = replace(calibration(), provenance=facts)
    assert measured.quota == CpuQuota(share=0.2, period_s=period_us / 1e6)
