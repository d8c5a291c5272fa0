"""A sweep on a real Slurm: among good points one that fails, one that hangs, one that is infeasible and one whose job
is preempted; it is interrupted, resumed and drawn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piper_hpc.runs import RunFolder
from piper_hpc.runs.sweeps import SweepFolder
from piper_hpc.testbed.slurm import URGENT
from piper_hpc.testbed.state import Testbed
from tests.live import SECONDS_TO_START, rank_process, until

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.untimed, pytest.mark.timeout(600)]

RATES = ("1e-3", "2e-3", "3e-3", "1e38", "-1")
GOOD, HANGS, TAKEN, FAILS, REFUSED = range(5)
SWEEP = (
    *("-m", f"train.learning_rate={','.join(RATES)}", "train.minimum_learning_rate=0"),
    *("cluster=testbed", "cluster.ranks_per_node=1", "cluster.calibration=off", "cluster.requeue=true"),
    *("train=smoke", "train.steps=25", "sweep.tasks=1", "sweep.stall_s=8"),
)


def command(module: str, *words: str, cwd: Path, code: int = 0) -> Any:
    """What a command of ours answers as JSON."""
    answer = subprocess.run(
        [sys.executable, "-m", f"piper_hpc.{module}", *words], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    return json.loads(answer.stdout)


def test_a_sweep_comes_through_all_that_may_happen_to_it(testbed: Testbed, tmp_path: Path) -> None:
    documents = command("launch", *SWEEP, "format=json", cwd=tmp_path, code=2)
    assert [bool(one.get("errors")) for one in documents] == [False, False, False, False, True]
    sweep = SweepFolder(tmp_path / "runs" / "sweeps" / documents[0]["sweep"])
    runs = [RunFolder(one["path"]) for one in documents[:REFUSED]]

    def slurm(*words: str) -> str:
        environment = os.environ | testbed.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    def steps_begin(index: int, beyond: int = 1) -> None:
        until(lambda: len(runs[index].metrics()) > beyond, SECONDS_TO_START, f"point {index} takes steps")

    # One hangs: nobody is lost, and the peers would wait for minutes.
    steps_begin(HANGS)
    rank_process(runs[HANGS], 1).send_signal(signal.SIGSTOP)

    # The next is preempted with its job, which Slurm puts back into the queue.
    steps_begin(TAKEN)
    (job,) = sweep.jobs()
    slurm("sbatch", f"--partition={URGENT}", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: "PENDING" in slurm("squeue", "-h", "-j", job["id"], "-o", "%T"), 60, "the task is queued again")
    slurm("scontrol", "update", f"JobId={job['id']}_0", "StartTime=now")
    until(lambda: [one.attempt for one in sweep.claims()[TAKEN]] == [0, 1], SECONDS_TO_START, "it is taken up again")
    assert [len(sweep.claims()[index]) for index in (GOOD, HANGS)] == [1, 1]

    # A user goes home, and comes back.
    assert command("jobs", "status", sweep.name, "--json", cwd=tmp_path)["points"][TAKEN]["state"] == "running"
    assert command("jobs", "cancel", sweep.name, "--json", cwd=tmp_path)["totals"]["by_state"]["pending"] == 2
    assert slurm("squeue", "-h", "-j", job["id"]) == ""
    assert command("jobs", "resume", sweep.name, "--json", cwd=tmp_path)["jobs"][1]["tasks"] == 1
    document = command("jobs", "wait", sweep.name, "--json", cwd=tmp_path, code=1)

    rows = document["points"]
    assert [(row["state"], row["failure_class"]) for row in rows] == [
        ("completed", None),
        ("failed", "hang"),
        ("completed", None),
        ("failed", rows[FAILS]["failure_class"]),
        ("refused", None),
    ]
    assert rows[FAILS]["failure_class"] in ("error", "numerical") and "grad" in rows[FAILS]["reason"]
    assert "no sign of life" in rows[HANGS]["reason"] and "-1" in rows[REFUSED]["reason"]
    assert {row["step"] for row in runs[TAKEN].metrics()} == set(range(25))
    assert len(sweep.claims()[TAKEN]) == 3 and document["totals"]["spent_node_hours"] > 0
    assert runs[GOOD].job()["id"] == f"{job['id']}_0" and runs[GOOD].job()["step"] == "0"

    synced = command("jobs", "sync", sweep.name, "--offline", "--json", cwd=tmp_path)["runs"]
    assert [one["state"] for one in synced] == ["synced"] * 4

    # The same command finds what is done, and would run what failed again.
    again = command("launch", *SWEEP, "dry_run=true", "format=json", cwd=tmp_path, code=2)
    assert [bool(one.get("script")) for one in again] == [False, True, False, True, False]
    of_the_page = ("parallelism.pp=1,2,4", "parallelism.all_to_all=flat,halo_dedup", "cluster=testbed", "train=smoke")
    shown = command("launch", "-m", *of_the_page, "dry_run=true", "format=json", cwd=tmp_path)
    assert len(shown) == 6 and all("#SBATCH --array=0-5" in one["script"] for one in shown)
    page = Path(command("jobs", "dashboard", sweep.name, "--json", cwd=tmp_path)["path"]).read_text()
    drawn = json.loads(page.split('id="data">')[1].split("</script>")[0])["points"]
    assert [point["state"] for point in drawn] == [row["state"] for row in rows]
    assert 'http-equiv="refresh"' not in page
