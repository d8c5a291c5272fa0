"""The launch command without running anything: dry runs, plans, JSON on stdout, and bad input that leaves no trace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.paths import data_folder
from tests.full import full

pytestmark = pytest.mark.slow  # a launch a test, a second each

TORCH_FREE = (
    *("launch", "jobs", "planner.search", "resource_model.predict", "spec", "forecast", "runs", "config"),
    "prepare.__main__",
)


def launch(*overrides: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "piper_hpc.launch", *overrides]
    environment = os.environ | (env or {})
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["stepz", "--cfg job"]),
        pytest.param(
            ["+train.chekpoint_every=10"],
            ["train.chekpoint_every = 10", "the nearest is train.checkpoint_every"],
            marks=full,
        ),
        pytest.param(
            ["+nonsense.key=1", "dry_run=true"], ["nonsense.key = 1", "no key of the configuration"], marks=full
        ),
        (["+cluster.qoss=debug", "task=plan"], ["cluster.qoss = 'debug'", "--cfg job"]),
        (["train.steps=many"], ["train.steps", "many", "Integer"]),
        (["model=huge"], ["model", "huge", "tiny", "mixtral_8x7b"]),
        (["parallelism=["], ["parallelism=["]),
        pytest.param(
            ["parallelism.ep=4"], ["parallelism = ", "must equal the ranks", "cluster.ranks_per_node=8"], marks=full
        ),
        pytest.param(
            ["parallelism.ep=3", "cluster.ranks_per_node=6"],
            ["parallelism.ep = 3", "must divide", "parallelism.ep=2"],
            marks=full,
        ),
        pytest.param(["model.layers=1"], ["parallelism.pp = 2", "model.layers=2"], marks=full),
        pytest.param(
            ["parallelism.schedule=dualpipev", "parallelism.vpp=2", "train.global_batch=4"],
            ["parallelism.schedule = 'dualpipev'", "at least 2 pp = 4", "parallelism.schedule=1f1b"],
            marks=full,
        ),
        pytest.param(
            ["train.global_batch=30"], ["train.global_batch = 30", "multiple of", "train.global_batch=32"], marks=full
        ),
        pytest.param(["model.top_k=9"], ["model.top_k = 9", "model.top_k=8"], marks=full),
        pytest.param(["data=text"], ["data.path", "must be given"], marks=full),
        pytest.param(["data.path=/nowhere"], ["data.path = '/nowhere'", "data=stdlib"], marks=full),
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
        pytest.param(["task=plan", "plan.memory_headroom=little"], ["plan.memory_headroom", "little"], marks=full),
        pytest.param(["task=plan", "plan.shades=many"], ["plan.shades", "many"], marks=full),
        (["task=plan", "model=olmoe", "model.sequence=1"], ["model.sequence = 1", "model.sequence=4096"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_ends_with_2_a_message_that_helps_and_no_trace_of_itself(overrides, words, tmp_path):
    # The rules of rows marked full are held by tests/config/test_config.py too, without a process for each; a value of
    # the wrong type is train.steps=many, whatever the key.
    # Not even an installed Slurm may answer here: the launcher sees only Python on its PATH.
    ended = launch(*overrides, cwd=tmp_path, env={"PATH": str(Path(sys.executable).parent)})
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert all(word in ended.stderr for word in words), ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["one", "sweep"])
def test_a_secret_on_the_command_line_is_kept_nowhere(sweep, tmp_path):
    """A sweep's own file has the words of its command, before any configuration is checked."""
    words = (
        *sweep,
        "+cluster.environment.WANDB_API_KEY=hunter2hunter2",
        "train.steps=1,2" if sweep else "train.steps=1",
    )
    ended = launch(*words, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert "export WANDB_API_KEY=..." in ended.stderr or "export ...=..." in ended.stderr
    assert "hunter2" not in ended.stderr + ended.stdout and list(tmp_path.iterdir()) == []


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


def test_a_dry_run_prints_the_script_and_submits_nothing(tmp_path):
    ended = launch("cluster=frontier", "experiment=paper_mixtral", "cluster.account=abc", "dry_run=true", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "#SBATCH --account=abc" in ended.stdout
    assert "8 nodes, 64 ranks, at most 16 node-hours, 128 device-hours" in ended.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_its_time_limit_would_end_is_said_to_be_too_long(tmp_path):
    longer = ("train.steps=100000", "cluster.time_min=600")
    ended = launch("cluster=frontier", "experiment=paper_mixtral", "dry_run=true", *longer, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    told = re.search(r"predicted: (\S+) s .* GiB of 59.6 GiB a rank", ended.stdout)
    works = re.search(r"too long: the limit of 36000 s .* cluster.time_min=(\d+) or more", ended.stdout)
    assert "frontier ends jobs of 8 nodes after 120 min at most" in ended.stdout
    assert "frontier asks its users for cluster.account, which is not given" in ended.stdout
    assert told and works and float(told[1]) / 60 == pytest.approx(int(works[1]), rel=0.01)


def test_a_layout_that_does_not_fit_its_ranks_is_said_to_be_too_large(tmp_path):
    layout = ("model=mixtral_8x7b", "train=paper", "parallelism.pp=8", "parallelism.ep=8")
    ended = launch("cluster=frontier", "cluster.account=abc", "dry_run=true", *layout, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"too large: \d+ GiB of memory is predicted for a rank, which has 59.6 GiB", ended.stdout)
    assert "asks its users" not in ended.stdout


def test_files_of_ones_own_are_found_by_a_variable_and_said(tmp_path):
    """A cluster file and its batch script in a folder outside the checkout, whose name has a blank."""
    own = tmp_path / "my site"
    (own / "cluster").mkdir(parents=True)
    own_file = (data_folder("conf") / "cluster" / "slurm.yaml").read_text().replace("generic.sbatch", "mine.sbatch")
    (own / "cluster" / "mine.yaml").write_text(own_file)
    (own / "mine.sbatch").write_text("#!/bin/bash\n#SBATCH --time=1\necho mine\n")
    work = tmp_path / "work"
    work.mkdir()
    asked = ("cluster=mine", "cluster.memory_gib_per_rank=80", "task=microbench", "dry_run=true")
    for words, env in ((asked, {"PIPER_CONF": str(own)}), (("--config-dir", str(own), *asked), {})):
        ended = launch(*words, cwd=work, env=env)
        assert ended.returncode == 0, ended.stderr
        assert f"from {own}: cluster=mine" in ended.stdout and "echo mine" in ended.stdout
    refused = launch(*asked, "cluster.template=other.sbatch", cwd=work, env={"PIPER_CONF": str(own)})
    assert refused.returncode == 2 and str(own) in refused.stderr and "generic.sbatch" in refused.stderr


def test_a_schedule_is_chosen_before_submission_and_said(tmp_path):
    degrees = ("parallelism.pp=4", "model.layers=8", "train.global_batch=512", "parallelism.schedule=auto")
    ended = launch("cluster=frontier", "cluster.account=abc", "dry_run=true", *degrees, "format=json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    layout = json.loads(ended.stdout)["prediction"]["layout"]
    told = f"schedule=auto: {layout['schedule']} with vpp={layout['vpp']}, "
    assert layout["schedule"] != "auto" and told in ended.stderr
    assert "a step predicted against" in ended.stderr


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
