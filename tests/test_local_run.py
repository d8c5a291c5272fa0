"""The whole loop on this machine: measure, predict, train over four processes, compare, report."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.runs import RunFolder, find
from piper_hpc.runtime import quota
from piper_hpc.spec import TERMS

pytestmark = pytest.mark.processes

STEPS = 12


def launch(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("loop")


@pytest.fixture(scope="module")
def first(folder) -> tuple[RunFolder, str]:
    """The first run of a machine: nothing is measured yet."""
    variable = "+cluster.environment.NCCL_DEBUG=WARN"
    ended = launch(f"train.steps={STEPS}", "task.budget_s=4", "tracking=wandb_offline", variable, cwd=folder)
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
    planned = RunFolder(document["path"]).config()["parallelism"]
    assert planned["auto"] is False and planned["pp"] * planned["ep"] * planned["dp"] == 4


def test_without_quotas_ranks_share_cores_and_the_bubble_does_not_apply(first, folder):
    if len(os.sched_getaffinity(0)) >= 4:
        pytest.skip("four ranks do not share cores on a machine with four cores or more")
    ended = launch("cluster.quota=off", "train=smoke", "task.budget_s=3", cwd=folder)
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


def test_a_microbench_run_shows_its_rows(folder):
    ended = launch("task=microbench", "task.budget_s=3", cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "grouped_gemm" in ended.stdout
    assert "all_to_all/node/2" in ended.stdout


def test_wide_suites_are_added_to_a_calibration_where_there_is_one(folder, tmp_path):
    """After the calibration suite of the same run; alone, on a machine where nothing was measured, they are rows."""
    wide = ("task=microbench", "task.cell_s=0.02", "task.budget_s=3")
    ended = launch(*wide, "task.suites=[calibration,gemm,p2p,all_to_all]", cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    path = max((folder / "runs" / "calibrations").glob("local-1x4-float32-*.json"), key=os.path.getmtime)
    document = json.loads(path.read_text())
    assert {"gemm", "host_op", "p2p/node", "all_to_all/node/4"} <= set(document["curves"])
    assert {"gemm", "p2p/node", "all_to_all/node/2"} <= {fit["operator"] for fit in document["fits"]}
    dry = launch("dry_run=true", "format=json", cwd=folder)
    assert json.loads(dry.stdout)["prediction"]["calibration"]["measured"] is True

    alone = launch(*wide, "task.suites=[gemm]", "cluster.ranks_per_node=1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    (run,) = find(tmp_path / "runs")
    assert run.measurements() and "no calibration to add to" in run.manifest()["job"]["calibration"][0]
    assert not (tmp_path / "runs" / "calibrations").exists()


def test_a_calibration_of_one_rank_cannot_predict_four_and_says_so(tmp_path):
    """It has no curve of a link; nothing is submitted."""
    alone = launch("task=microbench", "task.budget_s=2", "cluster.ranks_per_node=1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    (path,) = (tmp_path / "runs" / "calibrations").glob("*.json")
    refused = launch("dry_run=true", f"cluster.calibration={path}", cwd=tmp_path)
    assert refused.returncode == 2 and "cluster.calibration=off" in refused.stderr and "p2p" in refused.stderr


def test_auto_takes_what_the_dispatch_suite_measured(folder):
    """From the suite over the calibration file to what a run exchanges by, and its record."""
    suites = ("task.suites=[calibration,dispatch]", "task.budget_s=3", "task.cell_s=0.02")
    ended = launch("task=microbench", *suites, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "flat_dedup" in ended.stdout
    of_all = ("train=smoke", "parallelism.pp=1", "parallelism.ep=4", "parallelism.all_to_all=auto")
    trained = launch(*of_all, cwd=folder)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (chosen,) = find(folder / "runs")[-1].manifest()["job"]["all_to_all"]
    assert chosen["ranks"] == [0, 1, 2, 3] and chosen["algorithm"] in ("flat", "flat_dedup")
    assert "as measured at" in chosen["why"] and not chosen["notes"]
    assert all(cell.startswith("groups of 4 ranks on 1 nodes in 1 rack:") for cell in chosen["rests_on"])
    assert chosen["seconds"][min(chosen["seconds"], key=chosen["seconds"].get)] > 0


def test_a_wide_suite_shows_its_rows_live_and_is_resumed(folder):
    """The first run is interrupted; the second takes its rows over, and a third of another type is refused."""
    suites = ("task=microbench", "task.suites=[p2p]", "task.cell_s=0.02", "cluster.ranks_per_node=2")
    command = [sys.executable, "-m", "piper_hpc.launch", *suites, "task.cell_s=2"]
    launcher = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert launcher.stdout is not None
    shown = []
    for line in launcher.stdout:
        shown.append(line)
        if line.startswith("  p2p/node"):
            launcher.send_signal(signal.SIGINT)
            break
    shown += launcher.stdout.readlines()
    assert launcher.wait() == 130, "".join(shown)
    run, text = find(folder / "runs")[-1], "".join(shown)
    assert "algbw" in text and f"task.resume={run.run_id}" in text and "rows were measured and are kept" in text
    cells = {row["cell"] for row in run.measurements()}
    assert cells and run.status().state == "cancelled"

    ended = launch(*suites, f"task.resume={run.run_id}", cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    resumed = find(folder / "runs")[-1]
    taken = {row["cell"] for row in resumed.measurements() if row.get("resumed_from") == run.run_id}
    assert taken == cells and len(resumed.measurements()) > len(cells)
    exported = json.loads((resumed.path / "measurements_nccl.json").read_text())
    assert len(exported["results"]) == len(resumed.measurements())
    assert {"time", "alg_bw", "bus_bw", "nwrong"} <= set(exported["results"][0]["out_of_place"])

    refused = launch(*suites, f"task.resume={run.run_id}", "train.dtype=bfloat16", cwd=folder)
    assert refused.returncode == 2 and "train.dtype was float32 and is bfloat16" in refused.stderr


def test_an_exception_in_the_job_is_classified_and_the_command_fails(folder):
    """A folder that cannot be written is found out by the ranks only."""
    ended = launch("data.cache=/proc/nowhere", "train=smoke", "cluster.calibration=off", cwd=folder)
    assert ended.returncode == 1
    status = find(folder / "runs")[-1].status()
    assert (status.state, status.failure_class) == ("failed", "error")
    assert "/proc/nowhere" in (status.reason or "")
    assert "logs:" in ended.stdout


def test_a_checkpoint_is_taken_up_again_by_another_layout(folder):
    first = launch("train=smoke", "train.steps=3", "train.checkpoint_last=true", "cluster.calibration=off", cwd=folder)
    assert first.returncode == 0, first.stdout + first.stderr
    saved = find(folder / "runs")[-1]
    further = ("train=smoke", "train.steps=5", f"train.resume_from={saved.checkpoints}", "cluster.calibration=off")
    second = launch(*further, "parallelism.pp=1", "parallelism.ep=4", cwd=folder)
    assert second.returncode == 0, second.stdout + second.stderr
    resumed = find(folder / "runs")[-1]
    assert [row["step"] for row in resumed.metrics()] == [3, 4]
    assert resumed.metrics()[0]["loss"] < saved.metrics()[0]["loss"]
