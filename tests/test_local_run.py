"""The whole loop on this machine: measure, predict, train over four processes, compare, report."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.runs import RunFolder, find
from piper_hpc.runtime import quota
from piper_hpc.spec import TERMS
from tests.full import full
from tests.live import launch

pytestmark = pytest.mark.processes

STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def first(folder) -> tuple[RunFolder, str]:
    """The first run of a machine: nothing is measured yet."""
    variable = "+cluster.environment.NCCL_DEBUG=WARN"
    ended = launch(f"train.steps={STEPS}", "task.budget_s=1", "tracking=wandb_offline", variable, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (run,) = find(folder / "runs")
    return run, ended.stdout


def test_the_record_is_whole(first):
    run, _ = first
    assert run.status().state == "completed"
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    manifest = run.manifest()
    assert manifest["versions"]["torch"] and manifest["user"] and manifest["job"]["flop_convention"]
    assert "GEMM" in manifest["job"]["peak_flops_source"]
    assert len(manifest["job"]["rank_map"]) == 4
    assert manifest["job"]["environment"]["NCCL_DEBUG"] == "WARN"
    assert {row["operator"] for row in run.measurements()} >= {"gemm", "grouped_gemm", "host_op", "p2p/node"}
    assert (run.path / "config.yaml").is_file()
    assert len(list(run.attempt_logs(0).glob("rank-*.log"))) == 4


def test_every_step_has_its_row_and_the_terms_add_up(first):
    run, _ = first
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert sum(row[term] for term in TERMS) == pytest.approx(row["step_time_s"], rel=1e-6)
        assert row["tokens"] == 32 * 128
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["step_time_s"])
        assert 0 < row["mfu"] < 1
        assert len(row["expert_load"]) == 4 and all(load >= 1 for load in row["expert_load"])
    assert all(size > 0 for size in rows[-1]["peak_memory_bytes"])
    assert rows[0]["loss"] == pytest.approx(5.55, abs=0.15)  # ln 256, and the auxiliary loss apart
    assert rows[-1]["loss"] < rows[0]["loss"] - 1


def test_both_sides_of_the_table_are_filled(first):
    run, output = first
    prediction = run.prediction()
    assert prediction is not None
    assert sum(prediction["terms"].values()) == pytest.approx(prediction["step_time_s"])
    assert prediction["calibration"]["measured"] is True
    busy = ("attention_s", "expert_s", "dispatch_s", "combine_s", "optimizer_s", "grad_reduce_s")
    assert all(prediction["terms"][term] > 0 for term in busy)
    for word in ("attention", "dispatch", "bubble", "optimizer", "step time", "peak memory"):
        assert word in output
    assert str(run.path / "report.html") in output.replace("\n", "")


def test_a_run_ends_with_what_the_best_layout_would_give(first, folder):
    run, output = first
    plan = json.loads(launch("task=plan", "format=json", cwd=folder).stdout)
    best, this = plan["candidates"][0], run.prediction()
    said = re.search(
        r"parallelism=auto would take (.*): .* a step predicted against .* for this layout; try it: (.*)", output
    )
    if best["step_time_s"] > 0.95 * this["step_time_s"]:
        assert said is None
        return
    layout = best["layout"]
    assert said is not None
    assert said[1].split()[:4] == [f"{axis}={layout[axis]}" for axis in ("pp", "ep", "dp", "micro_batch")]
    assert layout["schedule"] == "1f1b" or f"schedule={layout['schedule']}" in said[1]
    assert said[2].startswith(f"python -m piper_hpc.launch train.steps={STEPS} ")
    assert said[2].endswith(" parallelism=auto")


def test_the_report_stands_alone(first):
    run, _ = first
    html = (run.path / "report.html").read_text()
    assert "Plotly" in html
    assert not re.search(r"<(script|link|img)[^>]{0,200}(src|href)=.http", html)
    assert (run.path / "report.md").read_text().startswith("#")


def test_the_offline_wandb_run_holds_the_metrics(first):
    run, _ = first
    assert list(run.path.rglob("*.wandb"))


def test_the_second_run_predicts_before_it_starts(first, folder):
    """The calibration is cached, and a plan rests on it too."""
    known = len(find(folder / "runs"))
    dry = launch("dry_run=true", "format=json", cwd=folder)
    assert json.loads(dry.stdout)["prediction"]["calibration"]["measured"] is True
    plan = launch("task=plan", "format=json", cwd=folder)
    assert json.loads(plan.stdout)["feasible"] > 0
    assert len(find(folder / "runs")) == known


def test_a_planned_layout_trains(first, folder):
    ended = launch("parallelism=auto", "train=smoke", "format=json", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert document["status"]["state"] == "completed"
    # What checks/reframe_check.py reads.
    assert (document["network"]["nodes"], document["network"]["fallbacks"]) == (1, [])
    assert document["metrics"]["loss"] > 0 and document["metrics"]["tokens_per_s"] > 0
    assert [row["error_pct"] is not None for row in document["table"] if row["key"] == "step_time_s"] == [True]
    assert "network: none was crossed, all ranks are on one node" in ended.stderr
    planned = RunFolder(document["path"]).config()["parallelism"]
    assert planned["auto"] is False and planned["pp"] * planned["ep"] * planned["dp"] == 4


@full  # what it prints and predicts is in tests/resource_model/test_predict.py
def test_without_quotas_ranks_share_cores_and_the_bubble_does_not_apply(first, folder):
    if len(os.sched_getaffinity(0)) >= 4:
        pytest.skip("four ranks do not share cores on a machine with four cores or more")
    (measured,) = (folder / "runs" / "calibrations").glob("local-1x4-float32-*.json")
    ended = launch("cluster.quota=off", "train=smoke", f"cluster.calibration={measured}", cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = find(folder / "runs")[-1]
    assert run.manifest()["machine"]["devices_share_cores"] is True
    prediction = run.prediction()
    assert prediction is not None and prediction["bubble_fraction"] is None
    assert "not applicable" in ended.stdout


@pytest.mark.skipif(not quota.writable(), reason="needs writable cgroups: run as root")
def test_with_writable_cgroups_each_rank_is_a_device(first):
    run, _ = first
    machine = run.manifest()["machine"]
    assert machine["devices_share_cores"] is False
    assert 0 < machine["cpu_share"] <= 1
    assert not quota.processes(run.run_id)


def test_jobs_writes_the_report_of_a_run_that_nobody_waited_for(first):
    run, _ = first
    for name in ("report.html", "report.md"):
        (run.path / name).unlink()
    command = [sys.executable, "-m", "piper_hpc.jobs", "status", str(run.path)]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{STEPS} of {STEPS}" in asked.stdout
    assert (run.path / "report.html").exists() and (run.path / "report.md").exists()


def test_a_profile_is_a_trace_with_every_rank(first, folder):
    ended = launch("task=profile", "train=smoke", cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = find(folder / "runs")[-1]
    events = json.loads((run.path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in spans} == {0, 1, 2, 3}
    assert {"attention", "expert", "dispatch"} <= {event["name"].split()[0] for event in spans}
    assert str(run.path / "trace.json") in ended.stdout.replace("\n", "")
    command = [sys.executable, "-m", "analysis.validate", "replay", str(run.path), "--json"]
    (found,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["replays"]
    assert (found["schedule"], found["steps"]) == ("1f1b", 3)
    assert abs(found["error_pct"]) < 50  # three steps of a busy machine; docs/validation.md has quiet ones


def test_an_exception_in_the_job_is_classified_and_the_command_fails(folder):
    """A folder that cannot be written is found out by the ranks only."""
    ended = launch("data.cache=/proc/nowhere", "train=smoke", "cluster.calibration=off", cwd=folder)
    assert ended.returncode == 1
    status = find(folder / "runs")[-1].status()
    assert (status.state, status.failure_class) == ("failed", "error")
    assert "/proc/nowhere" in (status.reason or "")
    assert "logs:" in ended.stdout
