"""Runs on a real Slurm: they cross nodes, their states are Slurm's, and every way to end one is told apart."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cli.errors import INTERRUPTED
from piper_hpc.jobs import describe
from piper_hpc.runs import RunFolder, Status, find
from piper_hpc.spec import TERMS
from piper_hpc.studies.ablation.__main__ import main as ablation
from piper_hpc.studies.headline.__main__ import main as headline
from piper_hpc.studies.headline.judge import point_of
from piper_hpc.studies.headline.strategies import STRATEGIES
from piper_hpc.studies.own_runs.__main__ import main as own_runs
from piper_hpc.studies.shared_overlap.__main__ import main as shared_overlap
from piper_hpc.testbed.state import Testbed, counters
from tests.full import full
from tests.live import SECONDS_TO_END, SECONDS_TO_START, processes_of, rank_process, start, training, until

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 8
UNMEASURED = ("train=smoke", "cluster.calibration=off")
QUICK = ("cluster=testbed", "cluster.ranks_per_node=1", *UNMEASURED)  # half of the ranks start in half the time
ENDLESS = (*QUICK, "train.steps=100000")


def slurm(testbed: Testbed, *command: str) -> str:
    environment = os.environ | testbed.environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def accounted(testbed: Testbed, run: RunFolder) -> str:
    fields = ("--noheader", "--parsable2", "--allocations", "--format", "State")
    return slurm(testbed, "sacct", "--jobs", run.job()["id"], *fields).split(" ")[0]


# Of the session: what is untimed runs after other modules, and starts nothing anew.
@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("slurm-runs")


@pytest.fixture(scope="session")
def trained(testbed, folder) -> tuple[RunFolder, str, dict[str, int]]:
    """The whole loop on four nodes, and the bytes that each node's link sent meanwhile."""
    before = {node.name: counters(node.name)["tx_bytes"] for node in testbed.nodes}
    launcher = start("cluster=testbed", f"train.steps={STEPS}", "parallelism=pp2_ep4", "task.budget_s=8", cwd=folder)
    output, errors = launcher.communicate(timeout=400)
    assert launcher.returncode == 0, output + errors
    sent = {node.name: counters(node.name)["tx_bytes"] - before[node.name] for node in testbed.nodes}
    (run,) = find(folder / "runs")
    assert not list(run.path.rglob("*.pkl"))
    return run, output, sent


def test_it_ran_where_slurm_placed_it_and_slurm_calls_it_completed(trained, testbed):
    run, _, _ = trained
    until(lambda: accounted(testbed, run) not in ("", "RUNNING"), 2 * SECONDS_TO_END, "sacct knows of the end")
    assert accounted(testbed, run) == "COMPLETED", "".join(log.read_text() for log in run.logs.glob("slurm-*.out"))
    job = run.manifest()["job"]
    assert job["nodes"] == ["n1", "n2", "n3", "n4"]
    assert [place["rack"] for place in job["rank_map"]] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert job["environment"]["GLOO_SOCKET_IFNAME"] == "eth0"


def test_training_crossed_the_nodes_links(trained):
    """PP2 x EP4 on two ranks a node: stages meet between racks, and half of all routed rows leave their node."""
    _, _, sent = trained
    batch, sequence, hidden, top_k, layers, width = 32, 128, 128, 2, 4, 4
    stage_boundary = batch * sequence * hidden * width // 2  # two nodes a stage share a step's activations
    exchange = 2 * 2 * (layers // 2) * batch * sequence * top_k * hidden * width // 2 // 2
    for node, sent_bytes in sent.items():
        assert sent_bytes > STEPS * (stage_boundary + 0.8 * exchange), (node, sent)


def test_the_run_proves_which_network_it_used(trained):
    run, output, sent = trained
    network = run.manifest()["job"]["network"]
    assert (network["expected"], network["fallbacks"]) == ("socket", [])
    assert network["libraries"] == [{"library": "gloo", "provider": "", "interfaces": ["eth0"], "nodes": 4}]
    (link,) = network["interfaces"]
    # Start and end of the job are outside of what its ranks count: what remains is most of what the links sent.
    assert link["interface"] == "eth0" and 0.5 * sum(sent.values()) < link["sent_bytes"] <= sum(sent.values())
    assert re.search(r"network: gloo eth0; [\d.]+ [KMG]iB over eth0\n", output), output


def test_the_table_prints_the_step_time_with_its_error(trained):
    run, output, _ = trained
    prediction = run.prediction()
    assert prediction is not None and prediction["calibration"]["measured"] is True
    assert any("system" in name for names in prediction["calibration"]["rests_on"].values() for name in names)
    assert re.search(r"step time\s+[\d.]+ m?s\s+[\d.]+ m?s\s+[+-][\d.]+ %", output), output
    rows = run.metrics()
    assert len(rows) == STEPS
    assert sum(rows[-1][term] for term in TERMS) == pytest.approx(rows[-1]["step_time_s"])


@full  # in tests/slurm/test_faults.py the kernel kills one
@pytest.mark.untimed
@pytest.mark.parametrize("rank", [2, 0], ids=["middle rank", "rank 0"])
def test_a_killed_rank_fails_the_job_with_its_class(rank, testbed, tmp_path):
    launcher = start(*ENDLESS, "cluster.go_on=off", cwd=tmp_path)
    run = training(launcher, tmp_path / "runs")
    rank_process(run, rank).kill()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert (run.status().state, run.status().failure_class) == ("failed", "killed")
    assert "killed" in output
    until(lambda: accounted(testbed, run) == "FAILED", SECONDS_TO_END, "sacct says FAILED")
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")


@pytest.mark.untimed
def test_a_launcher_that_is_interrupted_leaves_the_job_to_slurm_and_jobs_follow_it(testbed, tmp_path):
    def jobs(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "piper_hpc.jobs", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    launcher = start(*ENDLESS, cwd=tmp_path)
    run = training(launcher, tmp_path / "runs")
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == INTERRUPTED
    assert f"python -m piper_hpc.jobs cancel {run.run_id}" in output
    # The job is Slurm's: it goes on, and whoever asks next is told so.
    assert accounted(testbed, run) == "RUNNING"
    assert json.loads(jobs("status", run.run_id, "--json").stdout)["status"]["state"] == "running"
    assert run.run_id in jobs("list").stdout
    assert jobs("logs", "latest", "--rank", "2").returncode == 0
    slurm(testbed, "scancel", "--signal=USR2", run.job()["id"])  # a warning, not the end
    steps = len(run.metrics())
    until(lambda: len(run.metrics()) > steps + 1, SECONDS_TO_END, "training goes on")
    assert "cancelled" in jobs("cancel", "latest").stdout
    assert accounted(testbed, run) == "CANCELLED"
    assert jobs("status", "nothing").returncode == 2
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")


@full  # what of it is not in the next
@pytest.mark.untimed
def test_the_batch_script_runs_by_hand(testbed, tmp_path):
    environment = os.environ | testbed.environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ROOT / "sbatch_templates" / "testbed.sbatch"
    command = ["sbatch", "--wait", str(script), *UNMEASURED, "train.global_batch=32", "train.steps=3"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    log = "".join(path.read_text() for path in tmp_path.glob("slurm-*.out"))
    assert ended.returncode == 0, ended.stderr + log
    (run,) = find(tmp_path / "runs")
    assert describe(run)["status"]["state"] == "completed"
    assert len(run.metrics()) == 3


@pytest.mark.untimed
def test_a_requeued_script_of_a_users_own_goes_on_in_its_folder(testbed, tmp_path):
    environment = os.environ | testbed.environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ROOT / "sbatch_templates" / "testbed.sbatch"
    words = [*UNMEASURED, "cluster.ranks_per_node=1", "train.global_batch=32", "train.steps=100000"]
    command = ["sbatch", "--parsable", "--requeue", "--ntasks-per-node=1", str(script), *words]
    job = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    job = job.strip()

    def attempts() -> set[int]:
        return {row["attempt"] for run in find(tmp_path / "runs") for row in run.metrics()}

    try:
        until(lambda: attempts() == {0}, SECONDS_TO_START, "training starts")
        slurm(testbed, "scontrol", "requeue", job)
        # Slurm would wait two minutes; it takes the change once the first attempt is gone.
        until(
            lambda: "PENDING" in slurm(testbed, "squeue", "--jobs", job, "--format", "%T"), SECONDS_TO_END, "requeued"
        )
        slurm(testbed, "scontrol", "update", f"JobId={job}", "StartTime=now")
        until(lambda: attempts() == {0, 1}, SECONDS_TO_START, "the second attempt trains")
        (run,) = find(tmp_path / "runs")
        assert run.job()["id"] == job
    finally:
        slurm(testbed, "scancel", job)
    until(lambda: describe(run)["status"]["state"] == "cancelled", SECONDS_TO_END, "the record says cancelled")


@pytest.mark.untimed
def test_more_nodes_than_there_are_is_refused_before_anything_is_submitted(testbed, tmp_path):
    launcher = start("cluster=testbed", "cluster.nodes=64", "train.global_batch=512", cwd=tmp_path)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert "cluster.nodes = 64" in errors and "cluster.nodes=4" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.untimed
def test_a_partition_that_does_not_exist_is_refused(testbed, tmp_path):
    launcher = start(*QUICK, "cluster.partition=nosuch", cwd=tmp_path)
    _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 2
    assert "nosuch" in errors and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@full  # tests/slurm/test_new_user.py asks it too
@pytest.mark.untimed
def test_the_doctor_asks_every_node(testbed, tmp_path):
    command = [sys.executable, "-m", "piper_hpc.doctor", "cluster=testbed", "on=nodes", "--json"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(answer.stdout)
    seen = {each["where"] for each in found if each["subject"] == "shared folder" and each["state"] == "ok"}
    assert len(seen) == len(testbed.nodes)
    assert {each["state"] for each in found if each["subject"] in ("Slurm", "partition", "accounting")} == {"ok"}


@pytest.mark.untimed
def test_our_own_runs_are_predicted_and_judged(trained, folder, capsys, monkeypatch):
    """The short form of `make validate-testbed`: two points, once, on the calibration that is there."""
    monkeypatch.chdir(folder)
    ended = own_runs(["--only", "narrow pp1 ep8 flat", "--only", "narrow pp2 flat skewed", "--repeats", "1"])
    out, err = capsys.readouterr()
    assert ended in (0, 1), err
    points = [line for line in out.splitlines() if line.startswith(("narrow", "wide"))]
    assert len(points) == 2 and all(" s " in line and "%" in line for line in points)
    assert "Kendall's tau" in out and "peak memory" in out
    run = find(folder / "runs")[-1]
    run.write_status(Status("failed", failure_class="killed", reason="as if it had been"))
    assert own_runs(["--resume", str(run.path)]) == ended
    rows = [row for row in run.measurements() if row["operator"] == "own_runs/measured"]
    assert len(rows) == 2, "what was measured is not measured again"


@pytest.mark.untimed
@pytest.mark.parametrize("other", ["c", pytest.param("a_padded", marks=full)])  # padded steps take ten times as long
def test_strategies_are_compared_on_the_testbed_that_is_up(other, trained, folder, capsys, monkeypatch):
    """The short form of `make compare-strategies`: two strategies, one setting of each, once."""
    monkeypatch.chdir(folder)
    ended = headline(["--as-it-is", "--only", f"{other},d", "--settings", "1", "--repeats", "1"])
    out, err = capsys.readouterr()
    assert ended in (0, 1), err
    assert f"{other} {STRATEGIES[other].name}" in out and "d the planner's choice" in out
    assert re.search(r"losses differ by at most +\S+ +<= 0.001 +met", out), out
    point = point_of(find(folder / "runs")[-1])
    theirs, ours = point.entries[other], point.entries["d"]
    assert theirs.wire_s > 0 and theirs.cpu_s > 0 and ours.wire_s > 0
    assert theirs.layout.ep == (2 if other == "c" else 8), "inside nodes, or over all ranks"
    assert (ours.layout.pp * ours.layout.ep, ours.tried, len(ours.steps_s)) == (8, 1, 1)
    if other == "a_padded":
        assert theirs.wire_s >= ours.wire_s  # on these links the planner too may exchange among all


@pytest.mark.untimed
def test_parts_are_ablated_on_the_testbed_that_is_up(trained, folder, capsys, monkeypatch):
    """The short form of `make ablation`: skewed routing without and with migration, once. What is gained is a time,
    and others run beside this test: the prediction must gain, and the load, which is a count."""
    monkeypatch.chdir(folder)
    ended = ablation(["--as-it-is", "--only", "PP2xEP4 dedup overlap schedule skewed", "--repeats", "1"])
    out, err = capsys.readouterr()
    assert ended == 0, err
    (predicted,) = re.findall(r"migration +PP2xEP4 +- +[0-9.]+ \(([0-9.]+)\)", out)
    assert float(predicted) > 1
    loads = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("PP2xEP4")]
    assert len(loads) == 2 and min(loads) < max(loads) / 1.5


@full  # what its ranks measure is tested on two of this machine in tests/studies
@pytest.mark.untimed
def test_what_shared_experts_hide_is_measured_on_the_testbed_that_is_up(trained, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    ended = shared_overlap(["--as-it-is", "--only", "flat", "--repeats", "1"])
    out, err = capsys.readouterr()
    assert ended in (0, 1), err
    assert len([line for line in out.splitlines() if line.startswith("flat")]) == 3
