"""`plan.trace`: the best plan's timeline on disk, and files that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cluster import accelerator
from piper_hpc.cluster import preset as machine
from piper_hpc.planner import plan
from piper_hpc.planner.trace import check_path, write
from piper_hpc.resource_model import ResourceModelError, predict
from piper_hpc.resource_model.predict import timeline
from piper_hpc.spec import EXECUTIONS, ClusterSpec, Layout, SpecError, Workload
from tests.presets import preset
from tests.resource_model.clusters import TINY, cluster

PIPELINE = Layout(pp=2, ep=2, micro_batch=2)
WORKLOAD = Workload(global_batch=32, sequence=128)


@pytest.fixture(scope="module")
def h100() -> ClusterSpec:
    return machine.cluster("dgx_h100", 16, accelerator.load("h100"))


def ranks_of(path: Path) -> dict[int, float]:
    """Seconds that the events of every rank fill."""
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    return {pid: sum(e["dur"] for e in spans if e["pid"] == pid) / 1e6 for pid in {e["pid"] for e in spans}}


def test_the_executors_own_timeline_has_the_waits_of_its_prediction() -> None:
    where = cluster(nodes=2, ranks_per_node=2)
    played, predicted = timeline(TINY, where, PIPELINE, WORKLOAD), predict(TINY, where, PIPELINE, WORKLOAD)
    assert len(played.timed_actions) == PIPELINE.pp
    assert any(predicted.terms["p2p_s"] == pytest.approx(waited) for waited in played.p2p_s)
    # The step ends after it: gradients are reduced and applied once all backwards are done.
    assert played.step_s < predicted.step_time_s


def test_the_timeline_of_fused_kernels_is_that_of_the_schedule(h100: ClusterSpec) -> None:
    layout = Layout(pp=4, vpp=2, ep=4, schedule="interleaved")
    megatron, workload = EXECUTIONS["megatron"], Workload(64, 4096)
    played = timeline(preset("mixtral_8x7b"), h100, layout, workload, megatron)
    predicted = predict(preset("mixtral_8x7b"), h100, layout, workload, megatron)
    assert sum(len(timed_actions) for timed_actions in played.timed_actions) == 2 * 4 * 2 * layout.micro_batches(64)
    waits = played.step_s - max(played.busy_s)
    assert predicted.terms["bubble_s"] + predicted.terms["p2p_s"] == pytest.approx(waits)


def test_a_step_of_too_many_actions_is_refused(h100: ClusterSpec) -> None:
    with pytest.raises(ResourceModelError, match="too many actions"):
        timeline(preset("tiny"), h100, Layout(pp=2, ep=8), Workload(2**20, 128), EXECUTIONS["megatron"])


def test_the_file_has_a_process_for_every_stage_of_the_best(tmp_path: Path) -> None:
    where = cluster(nodes=2, ranks_per_node=2)
    found = plan(TINY, where, WORKLOAD, executor="piper")
    path = check_path("best.json", tmp_path)
    write(found, TINY, where, path)
    layout = found.candidates[0].layout
    filled, played = ranks_of(path), timeline(TINY, where, layout, WORKLOAD)
    assert set(filled) == set(range(layout.pp))
    assert all(seconds == pytest.approx(played.step_s) for seconds in filled.values())


def test_no_plan_has_no_timeline(tmp_path: Path) -> None:
    where = cluster(nodes=5, ranks_per_node=1)  # more than TINY's layers, and neither experts nor batch divide by it
    found = plan(TINY, where, Workload(global_batch=1, sequence=128), executor="piper", ranks=[5])
    assert not found.candidates
    with pytest.raises(SpecError, match="no layout fits") as raised:
        write(found, TINY, where, tmp_path / "best.json")
    assert raised.value.problems[0].key == "plan.trace"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "rule"), [(".", "is a folder"), ("nowhere/best.json", "does not")])
def test_a_file_that_cannot_be_is_refused(name: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=rule) as raised:
        check_path(name, tmp_path)
    assert raised.value.problems[0].works.startswith("plan.trace=")


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    def launch(trace: str) -> subprocess.CompletedProcess[str]:
        axes = ["plan.axes.pp=[4]", "plan.axes.vpp=[1]", "plan.axes.schedule=[1f1b]", "cluster.nodes=2"]
        words = ["task=plan", "cluster=dgx_h100", "model=mixtral_8x7b", "format=json", *axes, f"plan.trace={trace}"]
        command = [sys.executable, "-m", "piper_hpc.launch", *words]
        return subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)

    refused = launch("nowhere/best.json")
    assert refused.returncode == 2
    assert "plan.trace = 'nowhere/best.json'" in refused.stderr and "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []
    written = launch("best.json")
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["trace"] == str(tmp_path / "best.json")
    assert set(ranks_of(tmp_path / "best.json")) == {0, 1, 2, 3}
