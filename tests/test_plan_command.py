"""`launch task=plan` as a command: its document, its table, its workload, its head-room, the plan that it saves."""

from __future__ import annotations

import json
import re

import pytest

from tests.test_launch import launch

pytestmark = pytest.mark.slow  # most search every axis, seconds each


def test_a_plan_is_one_document_of_the_contract(tmp_path):
    ended = launch("task=plan", "experiment=paper_mixtral", "format=json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert set(plan) >= {"model", "cluster", "searched", "pruned", "feasible", "seconds", "candidates", "rejected"}
    assert plan["model"]["parameters"] > 46e9
    best = plan["candidates"][0]
    assert sum(best["terms"].values()) == pytest.approx(best["step_time_s"])
    assert plan["executor"] == "megatron" and best["calibration"]["measured"] is False
    mfus = [candidate["mfu"] for candidate in plan["candidates"]]
    assert mfus == sorted(mfus, reverse=True)


def test_a_plan_is_a_table_with_its_reasons_its_front_and_its_limits(tmp_path):
    ended = launch("task=plan", "experiment=paper_mixtral", "task.candidates=3", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = ("tokens/s", "MFU", "free", "rejected", "Eq 11", "front of step time", "what would lift it", "rests on")
    for words in told:
        assert words in ended.stdout, words
    assert "…" not in ended.stdout  # no figure is cut short


NARROW = (
    *("plan.axes.schedule=[1f1b]", "plan.axes.vpp=[1]", "plan.axes.cp=[1]", "plan.axes.recompute=[none,norm,full]"),
    *("plan.axes.zero=[1]", "plan.axes.etp=[1]"),
)


def test_a_plan_takes_the_models_workload_and_says_so(tmp_path):
    olmoe = ("task=plan", "model=olmoe", "cluster=dgx_h100", "cluster.nodes=2", *NARROW)
    own = launch(*olmoe, "format=json", cwd=tmp_path)
    assert own.returncode == 0, own.stderr
    plan = json.loads(own.stdout)
    assert (plan["sequence"], plan["global_batch"]) == (4096, 8 * 16)
    assert plan["workload_source"] == {
        "sequence": "model.sequence, of olmoe's pre-training",
        "global_batch": "8 for each of 16 ranks",
    }
    assert "128 sequences of 4096 tokens" in own.stderr and "global_batch: 8 for each of 16 ranks" in own.stderr
    given = launch(*olmoe, "train.sequence=1024", "train.global_batch=64", "format=json", cwd=tmp_path)
    plan = json.loads(given.stdout)
    assert (plan["sequence"], plan["global_batch"]) == (1024, 64)
    assert plan["workload_source"] == {"sequence": "as set", "global_batch": "as set"}
    assert "64 sequences of 1024 tokens" in given.stderr and "set others" not in given.stderr


def test_a_plan_leaves_memory_free_unless_told_not_to(tmp_path):
    mixtral = ("task=plan", "experiment=paper_mixtral", *NARROW, "format=json")
    kept, full = (
        json.loads(launch(*mixtral, *words, cwd=tmp_path).stdout) for words in ((), ("plan.memory_headroom=0",))
    )
    assert (kept["memory_headroom"], full["memory_headroom"]) == (0.08, 0.0)
    assert kept["limits"]["memory"]["headroom_bytes"] >= 0.08 * kept["memory_bytes"]
    assert kept["limits"]["memory"]["available_bytes"] == kept["memory_bytes"] == full["memory_bytes"]
    assert kept["feasible"] < full["feasible"]
    rule = "Eq 11: peak memory must fit the rank's memory"
    assert rule in full["rejected"] and f"{rule}, less a head-room of 8 %" in kept["rejected"]


def test_a_plan_fits_80_columns(tmp_path):
    mixtral = ("task=plan", "experiment=paper_mixtral", *NARROW, "plan.shades=true")
    ended = launch(*mixtral, cwd=tmp_path, env={"COLUMNS": "80"})
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("layout "))
    rows = lines[start : start + 21]
    assert all(len(row) <= 80 and "…" not in row for row in rows)
    assert all(re.search(r"pp\d+ ep\d+ tp\d+ dp\d+ ", row) for row in rows[1:])


def test_axes_and_executor_are_the_users(tmp_path):
    narrow = ("plan.axes.tp=[1]", "plan.axes.schedule=[1f1b]", "plan.axes.vpp=[1]", "task.ranks=[32,64]")
    ended = launch("task=plan", "experiment=paper_mixtral", *narrow, "format=json", cwd=tmp_path)
    plan = json.loads(ended.stdout)
    assert {candidate["layout"]["tp"] for candidate in plan["candidates"]} == {1}
    assert {one["ranks"] for one in plan["pareto"]} == {32, 64}
    own = launch("task=plan", "experiment=paper_mixtral", "task.executor=piper", *NARROW, "format=json", cwd=tmp_path)
    plan = json.loads(own.stdout)
    assert plan["executor"] == "piper"
    assert {candidate["layout"]["tp"] for candidate in plan["candidates"]} == {1}


def test_a_saved_plan_is_an_option_that_training_accepts(tmp_path):
    plan = launch("task=plan", "experiment=paper_mixtral", *NARROW, "plan.save=mine", "format=json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    saved = json.loads(plan.stdout)["saved"]
    assert saved["path"] == str(tmp_path / "conf" / "parallelism" / "mine.yaml")
    ready = ("parallelism=mine", "experiment=paper_mixtral", "cluster.account=abc", "dry_run=true", "format=json")
    dry = launch(*ready, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["prediction"]["layout"] == saved["layout"]
    for name in ("mine", "single"):
        again = launch("task=plan", "experiment=paper_mixtral", *NARROW, f"plan.save={name}", cwd=tmp_path)
        assert again.returncode == 2
        assert f"plan.save = '{name}'" in again.stderr and "plan.save=my_plan" in again.stderr


def test_a_plan_that_the_executor_cannot_run_is_not_saved(tmp_path):
    small = ("cluster=dgx_h100", "cluster.nodes=32", "model=deepseek_v3", "train=paper", *NARROW, "plan.axes.zero=[3]")
    ended = launch("task=plan", *small, "plan.save=v3", cwd=tmp_path)
    assert ended.returncode == 2, ended.stdout
    assert "the executor has no layout that fits" in ended.stderr and "zero=3" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_exported_once_and_what_cannot_be_said_is_refused(tmp_path):
    mixtral = ("task=plan", "experiment=paper_mixtral", *NARROW, "format=json", "plan.export=megatron")
    refused = launch(*mixtral, "plan.axes.schedule=[zbv]", "plan.axes.vpp=[2]", "plan.axes.pp=[2]", cwd=tmp_path)
    assert refused.returncode == 2 and "plan.axes.schedule = 'zbv'" in refused.stderr
    assert "this works: plan.axes.schedule=[1f1b,interleaved]" in refused.stderr
    alone = launch("task=plan", "experiment=paper_mixtral", "plan.export_file=mine.sh", cwd=tmp_path)
    assert alone.returncode == 2 and "plan.export=megatron plan.export_file=mine.sh" in alone.stderr
    assert list(tmp_path.iterdir()) == []
    written = launch(*mixtral, cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    plan = json.loads(written.stdout)
    assert plan["export"] == str(tmp_path / "megatron.sh")
    layout, text = plan["candidates"][0]["layout"], (tmp_path / "megatron.sh").read_text()
    degrees = {"pipeline-model-parallel": "pp", "tensor-model-parallel": "tp", "expert-model-parallel": "ep"}
    for name, axis in degrees.items():
        assert f"--{name}-size {layout[axis]}\n" in text
    again = launch(*mixtral, cwd=tmp_path)
    assert again.returncode == 2 and "plan.export_file=best.sh" in again.stderr
    assert (tmp_path / "megatron.sh").read_text() == text


def test_a_plan_without_measurements_says_how_to_get_them(tmp_path):
    ended = launch("task=plan", cwd=tmp_path)
    assert ended.returncode == 2
    assert "task=microbench cluster=local" in ended.stderr
