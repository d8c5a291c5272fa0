"""Micro-benchmarks on this machine: rows as they come, what they add to a calibration, and what runs then take."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cluster.calibration import save
from piper_hpc.runs import find
from tests.live import SECONDS_TO_END, launch, processes_of, until
from tests.resource_model.clusters import UNITS, calibration

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("microbench")


QUICK = ("task=microbench", "task.cell_s=0.02", "task.budget_s=1")
# Fits need a few sizes of each, also where others keep the machine busy.
WIDE = (
    "task=microbench",
    "task.cell_s=0.1",
    "task.budget_s=4",
    "task.suites=[calibration,gemm,p2p,all_to_all,dispatch]",
)


@pytest.fixture(scope="module")
def measured(folder: Path) -> str:
    """What a run of wide suites printed, after the calibration suite of the same run."""
    ended = launch(*WIDE, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_suites_show_their_rows_and_are_added_to_the_calibration(folder: Path, measured: str) -> None:
    assert all(operator in measured for operator in ("grouped_gemm", "all_to_all/node/2", "flat_dedup"))
    (path,) = (folder / "runs" / "calibrations").glob("local-1x4-float32-*.json")
    document = json.loads(path.read_text())
    assert {"gemm", "host_op", "p2p/node", "all_to_all/node/4"} <= set(document["curves"])
    assert {"gemm", "p2p/node", "all_to_all/node/2"} <= {fit["operator"] for fit in document["fits"]}


def test_on_a_machine_where_nothing_was_measured_a_suite_is_rows_alone(tmp_path: Path) -> None:
    alone = launch(*QUICK, "task.suites=[gemm]", "cluster.ranks_per_node=1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    (run,) = find(tmp_path / "runs")
    assert run.measurements() and "no calibration to add to" in run.manifest()["job"]["calibration"][0]
    assert not (tmp_path / "runs" / "calibrations").exists()


def test_a_calibration_of_one_rank_cannot_predict_four_and_says_so(tmp_path: Path) -> None:
    """It has no curve of a link; nothing is submitted."""
    path = tmp_path / "one_rank.json"
    save(calibration(*(name for name in UNITS if "/" in name and not name.startswith("grouped_gemm"))), path)
    refused = launch("dry_run=true", f"cluster.calibration={path}", cwd=tmp_path)
    assert refused.returncode == 2 and "cluster.calibration=off" in refused.stderr and "p2p" in refused.stderr


def test_auto_takes_what_the_dispatch_suite_measured(folder: Path, measured: str) -> None:
    """From the suite over the calibration file to what a run exchanges by, and its record."""
    of_all = ("train=smoke", "parallelism.pp=1", "parallelism.ep=4", "parallelism.all_to_all=auto")
    trained = launch(*of_all, cwd=folder)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    (chosen,) = find(folder / "runs")[-1].manifest()["job"]["all_to_all"]
    assert chosen["ranks"] == [0, 1, 2, 3] and chosen["algorithm"] in ("flat", "flat_dedup")
    assert "as measured at" in chosen["why"] and not chosen["notes"]
    assert all(cell.startswith("groups of 4 ranks on 1 nodes in 1 rack:") for cell in chosen["rests_on"])
    assert chosen["seconds"][min(chosen["seconds"], key=chosen["seconds"].get)] > 0


def test_a_wide_suite_shows_its_rows_live_and_is_resumed(folder: Path) -> None:
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
    until(lambda: not processes_of(run), SECONDS_TO_END, "no process is left")

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
