"""Placement of ranks on a real Slurm whose node order goes to and fro between racks: they stay inside with `pack`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from piper_hpc.runs import find
from piper_hpc.testbed.state import Testbed
from tests.live import start

pytestmark = [pytest.mark.slurm, pytest.mark.untimed, pytest.mark.processes, pytest.mark.timeout(600)]

CLUSTER = """\
name: testbed
scheduler: slurm
nodes: 4
ranks_per_node: 2
device: cpu
template: testbed.sbatch
calibration: "off"
environment: # the order of the tasks is the host file's
  SLURM_HOSTFILE: {hosts}
  SLURM_DISTRIBUTION: arbitrary
"""
BATCH, SEQUENCE, HIDDEN, TOP_K, LAYERS, WIDTH = 32, 128, 128, 4, 2, 4


def uplink_bytes() -> int:
    """Bytes that rack 1 has sent to the spine."""
    return int(Path("/sys/class/net/piper-u1/statistics/tx_bytes").read_text())


def test_expert_groups_stay_inside_a_rack_where_linear_would_straddle_two(testbed: Testbed, tmp_path: Path) -> None:
    """PP2 x EP4 on n1, n3, n2, n4 of racks {n1, n2} and {n3, n4}."""
    hosts, conf = tmp_path / "hosts", tmp_path / "site" / "cluster"
    hosts.write_text("".join(f"{node}\n" * testbed.ranks_per_node for node in ("n1", "n3", "n2", "n4")))
    conf.mkdir(parents=True)
    (conf / "to_and_fro.yaml").write_text(CLUSTER.format(hosts=hosts))
    before = uplink_bytes()
    launcher = start(
        "--config-dir", str(conf.parent), "cluster=to_and_fro", "train.steps=2", f"train.global_batch={BATCH}",
        f"train.sequence={SEQUENCE}", "parallelism.pp=2", "parallelism.ep=4", "parallelism.placement=pack",
        f"model.layers={LAYERS}", f"model.hidden={HIDDEN}", f"model.top_k={TOP_K}", cwd=tmp_path,
    )  # fmt: skip
    output, errors = launcher.communicate(timeout=400)  # Slurm may begin a job two minutes later
    assert launcher.returncode == 0, output + errors
    crossed = uplink_bytes() - before
    (run,) = find(tmp_path / "runs")
    script = next((run.batch).glob("*.sh")).read_text()
    assert re.search(r"^#SBATCH --switches=2@60$", script, re.M) and "--distribution=block" in script

    job = run.manifest()["job"]
    assert job["nodes"] == ["n1", "n2", "n3", "n4"]
    assert job["granted"]["switches"]["n3"] == ["spine", "rack2"] and job["granted"]["leaf_switches"] == 2
    assert [place["rack"] for place in job["rank_map"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [place["stage"] for place in job["rank_map"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    # As Slurm started the tasks, each stage would have stood in both racks.
    rack_of_task = dict(zip(job["task_of_rank"], (place["rack"] for place in job["rank_map"]), strict=True))
    assert [rack_of_task[task] for task in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    # Half of all routed rows would have crossed the uplinks, one way or the other, in each of four exchanges a layer.
    linear = 2 * 4 * LAYERS * BATCH * SEQUENCE * TOP_K * HIDDEN * WIDTH // 2 // 2
    between_stages = 2 * BATCH * SEQUENCE * HIDDEN * WIDTH
    assert between_stages < crossed < between_stages + linear / 2
