"""The launch command without running anything: dry runs, plans, JSON on stdout, and bad input that leaves no trace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.full import full

TORCH_FREE = ("launch", "jobs", "planner.search", "resource_model.predict", "spec", "forecast", "runs", "config")


def launch(*overrides: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    environment = os.environ | (env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["stepz", "--cfg job"]),
        (["+train.chekpoint_every=10"], ["train.chekpoint_every = 10", "the nearest is train.checkpoint_every"]),
        (["+nonsense.key=1", "dry_run=true"], ["nonsense.key = 1", "no key of the configuration"]),
        (["+cluster.qoss=debug", "task=plan"], ["cluster.qoss = 'debug'", "--cfg job"]),
        (["train.steps=many"], ["train.steps", "many", "Integer"]),
        (["model=huge"], ["model", "huge", "tiny", "mixtral_8x7b"]),
        (["parallelism=["], ["parallelism=["]),
        pytest.param(
            ["parallelism.ep=4"], ["parallelism = ", "must equal the ranks", "cluster.ranks_per_node=8"], marks=full
        ),
        (["parallelism.ep=3", "cluster.ranks_per_node=6"], ["parallelism.ep = 3", "must divide", "parallelism.ep=2"]),
        pytest.param(["model.layers=1"], ["parallelism.pp = 2", "model.layers=2"], marks=full),
        pytest.param(
            ["train.global_batch=4"], ["train.global_batch = 4", "at least pp = 2", "train.global_batch=8"], marks=full
        ),
        pytest.param(
            ["train.global_batch=30"], ["train.global_batch = 30", "multiple of", "train.global_batch=32"], marks=full
        ),
        pytest.param(["model.top_k=9"], ["model.top_k = 9", "model.top_k=8"], marks=full),
        pytest.param(["data=text"], ["data.path", "must be given"], marks=full),
        (["data.path=/nowhere"], ["data.path = '/nowhere'", "data=stdlib"]),
        (["cluster.nodes=2", "parallelism.dp=2"], ["cluster.nodes = 2", "one machine", "cluster.nodes=1"]),
        (["cluster=frontier", "train.global_batch=512"], ["cluster = 'frontier'", "sbatch", "dry_run=true"]),
        ([f"cluster.calibration={__file__}"], ["cluster.calibration", "test_launch.py", "cluster.calibration=off"]),
        (
            ["task=plan", "experiment=paper_mixtral", "cluster.data_sheet.peak_flops=0"],
            ["data_sheet.peak_flops=0", "above 0"],
        ),
        (["task=plan", "task.executor=deepspeed"], ["task.executor", "piper", "task.executor=auto"]),
        (["task=plan", "experiment=paper_mixtral", "plan.axes.tp=[0]"], ["plan.axes.tp = 0", "plan.axes.tp=[1]"]),
        (["task=plan", "experiment=paper_mixtral", "plan.save=../x"], ["plan.save = '../x'", "plan.save=my_plan"]),
        (["task=plan", "experiment=paper_mixtral", "task.ranks=[65]"], ["task.ranks = 65", "task.ranks=[64]"]),
        (["task=plan", "plan.memory_headroom=1.5"], ["plan.memory_headroom = 1.5", "plan.memory_headroom=0.08"]),
        (["task=plan", "plan.memory_headroom=little"], ["plan.memory_headroom", "little"]),
        (["task=plan", "plan.shades=many"], ["plan.shades", "many"]),
        (["task=plan", "model=olmoe", "model.sequence=1"], ["model.sequence = 1", "model.sequence=4096"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_2_a_message_that_helps_and_no_trace_of_itself(overrides, words, tmp_path):
    # The rules of rows marked full are held by tests/config/test_config.py too, without a process for each.
    # Not even an installed Slurm may answer here: the launcher sees only Python on its PATH.
    ended = launch(*overrides, cwd=tmp_path, env={"PATH": str(Path(sys.executable).parent)})
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert all(word in ended.stderr for word in words), ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_sbatch_refuses_is_told_and_leaves_nothing(tmp_path):
    commands = tmp_path / "bin"
    commands.mkdir()
    says = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    for name, body in (("sbatch", f"echo '{says}' >&2; exit 1"), ("srun", "exit 0"), ("sinfo", "echo 9000")):
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:/usr/bin:/bin"
    ended = launch("cluster=frontier", "train.global_batch=512", cwd=tmp_path, env={"PATH": path})
    assert ended.returncode == 2, ended.stderr
    assert "Invalid account" in ended.stderr and "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("runs/2*"))


def test_the_full_traceback_comes_when_asked_for(tmp_path):
    ended = launch("train.steps=0", cwd=tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr


def test_hydras_own_views_work(tmp_path):
    shown = launch("--cfg", "job", "train.steps=7", cwd=tmp_path)
    assert (shown.returncode, "steps: 7" in shown.stdout) == (0, True)
    tree = launch("--info", "defaults-tree", cwd=tmp_path)
    assert (tree.returncode, "parallelism: pp2_ep2" in tree.stdout) == (0, True)
    assert list(tmp_path.iterdir()) == []


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
    own = launch("task=plan", "experiment=paper_mixtral", "task.executor=piper", "format=json", cwd=tmp_path)
    plan = json.loads(own.stdout)
    assert plan["executor"] == "piper"
    assert {candidate["layout"]["tp"] for candidate in plan["candidates"]} == {1}


def test_a_saved_plan_is_an_option_that_training_accepts(tmp_path):
    plan = launch("task=plan", "experiment=paper_mixtral", "plan.save=mine", "format=json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    saved = json.loads(plan.stdout)["saved"]
    assert saved["path"] == str(tmp_path / "conf" / "parallelism" / "mine.yaml")
    ready = ("parallelism=mine", "experiment=paper_mixtral", "cluster.account=abc", "dry_run=true", "format=json")
    dry = launch(*ready, cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["prediction"]["layout"] == saved["layout"]
    for name in ("mine", "single"):
        again = launch("task=plan", "experiment=paper_mixtral", f"plan.save={name}", cwd=tmp_path)
        assert again.returncode == 2
        assert f"plan.save = '{name}'" in again.stderr and "plan.save=my_plan" in again.stderr


def test_a_plan_that_the_executor_cannot_run_is_not_saved(tmp_path):
    small = ("cluster=dgx_h100", "cluster.nodes=32", "model=deepseek_v3", "train=paper", "plan.axes.zero=[3]")
    ended = launch("task=plan", *small, "plan.axes.micro_batch=[1]", "plan.save=v3", cwd=tmp_path)
    assert ended.returncode == 2, ended.stdout
    assert "the executor has no layout that fits" in ended.stderr and "zero=3" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_measurements_says_how_to_get_them(tmp_path):
    ended = launch("task=plan", cwd=tmp_path)
    assert ended.returncode == 2
    assert "task=microbench cluster=local" in ended.stderr


def test_a_dry_run_prints_the_script_and_submits_nothing(tmp_path):
    ended = launch("cluster=frontier", "experiment=paper_mixtral", "cluster.account=abc", "dry_run=true", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --account=abc" in ended.stdout
    assert "node-hours" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_format_json_is_one_array(tmp_path):
    ended = launch("-m", "task=plan", "experiment=paper_mixtral", "cluster.nodes=8,16", "format=json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    plans = json.loads(ended.stdout)
    assert len(plans) == 2
    assert plans[0]["candidates"][0]["tokens_per_s"] < plans[1]["candidates"][0]["tokens_per_s"]


def test_one_bad_point_of_a_sweep_is_a_result_beside_the_others(tmp_path):
    ended = launch("-m", "task=plan", "experiment=paper_mixtral", "model.top_k=2,99", "format=json", cwd=tmp_path)
    assert ended.returncode == 2
    good, bad = json.loads(ended.stdout)
    assert good["feasible"] > 0
    assert bad["errors"][0]["key"] == "model.top_k"
    assert "model.top_k = 99" in ended.stderr


def test_a_key_that_nothing_reads_is_refused_in_a_sweep(tmp_path):
    ended = launch("-m", "+train.chekpoint_every=1,2", "dry_run=true", "format=json", cwd=tmp_path)
    assert ended.returncode == 2
    assert [each["errors"][0]["key"] for each in json.loads(ended.stdout)] == ["train.chekpoint_every"] * 2


def test_planning_and_launching_never_import_torch():
    modules = (
        "; ".join(f"import piper_hpc.{name}" for name in TORCH_FREE)
        + "; import analysis.validate, piper_hpc.report.write"
    )
    code = f"{modules}; import sys; sys.exit('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    assert ended.returncode == 0
