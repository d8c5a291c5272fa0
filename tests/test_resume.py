"""A killed run goes on bit for bit, with the all-to-all that was chosen; one that is asked to stop ends well, and
another layout takes its checkpoint up."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from piper_hpc.parallel.dispatcher import AllToAllConfigs
from piper_hpc.runs import RunFolder, find
from piper_hpc.runs.attempts import history
from piper_hpc.runs.checkpoints import Origin, Sidecar, new_folder, newest
from piper_hpc.spec import AllToAllConfig, Layout, ModelSpec, RankMap
from piper_hpc.tasks.all_to_all import selected_configs
from tests.live import SECONDS_TO_END, SECONDS_TO_START, rank_process, start, started, training, until
from tests.processes import run_ranks

pytestmark = pytest.mark.processes

RUN = ("train=smoke", "train.lr_schedule=constant", "cluster.calibration=off", "parallelism.all_to_all=auto")
LAYOUT = Layout(ep=4, all_to_all="auto")
MODEL = ModelSpec(
    "tiny", layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_ffn=16, vocab=64
)
KEPT = {(0, 1, 2, 3): AllToAllConfig("halo_dedup", chunks=4)}


def finished(*overrides: str, cwd: Path) -> RunFolder:
    launcher = start(*RUN, *overrides, cwd=cwd)
    output, errors = launcher.communicate(timeout=SECONDS_TO_START)
    assert launcher.returncode == 0, output + errors
    return find(cwd / "runs")[-1]


def rows(run: RunFolder) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in run.metrics()}


def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """What it trained after its newest checkpoint and before it was killed is what an undisturbed run trains."""
    seed = time.time_ns()
    print(f"seed {seed}")  # of the moment: pytest shows it where the test fails
    draw = random.Random(seed)
    with started(*RUN, "train.steps=100000", "train.checkpoint_every=4", cwd=tmp_path) as launcher:
        killed = training(launcher, tmp_path / "runs")
        until(lambda: newest(killed.checkpoints) is not None, SECONDS_TO_START, "a checkpoint is whole")
        time.sleep(draw.uniform(0.0, 1.0))
        for process in [rank_process(killed, rank) for rank in range(4)]:
            with suppress(psutil.NoSuchProcess):  # its supervisor was quicker
                process.kill()
        launcher.communicate(timeout=SECONDS_TO_END)
    assert killed.status().failure_class == "killed"
    saved = newest(killed.checkpoints)
    assert saved is not None
    first, undisturbed = Sidecar.read(saved).step, rows(killed)
    assert len(undisturbed) > first  # at the earliest the step after completes a checkpoint
    resumed = finished(f"train.steps={len(undisturbed)}", f"train.resume_from={killed.checkpoints}", cwd=tmp_path)
    assert rows(resumed) == {step: undisturbed[step] for step in range(first, len(undisturbed))}
    job = resumed.manifest()["job"]
    assert job["resumed"] == {"checkpoint": str(saved), "step": first, "same_layout_and_nodes": True}
    assert job["all_to_all"] and all("was trained" in each["why"] for each in job["all_to_all"])


def test_a_run_that_is_asked_to_stop_ends_well_and_goes_on_in_its_folder(tmp_path: Path) -> None:
    endless = ("train=smoke", "cluster.calibration=off", "train.steps=100000", "train.checkpoint_last=true")
    with started(*endless, cwd=tmp_path) as launcher:
        run = training(launcher, tmp_path / "runs")
        os.kill(rank_process(run, 1).pid, signal.SIGUSR1)
        output, errors = launcher.communicate(timeout=SECONDS_TO_END)
    assert launcher.returncode == 0, output + errors
    status, done = run.status(), len(run.metrics())
    assert (status.state, status.step) == ("completed", done - 1)
    assert status.reason == f"asked by SIGUSR1 to stop: {done} of 100000 steps are done"
    assert status.reason in output
    path = newest(run.checkpoints)
    assert path is not None and Sidecar.of_whole(path).step == done
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "att')
    words = [f"train.steps={done + 2}", "parallelism.pp=1", "parallelism.ep=4"]
    command = [sys.executable, "-m", "piper_hpc.jobs", "resume", "latest", *words]
    resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert [(row["step"], row["attempt"]) for row in run.metrics()[done:]] == [(done, 1), (done + 1, 1)]
    assert run.status().state == "completed" and (run.logs / "attempt-1" / "rank-3.log").exists()
    first, _ = history(run)
    assert (first["state"], first["new_steps"], first["reason"]) == ("completed", done, status.reason)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and f"has done all of its {done + 2} steps" in again.stderr


def select(run: RunFolder, checkpoint: Path, rack_of_node: tuple[int, ...]) -> AllToAllConfigs | None:
    context: Any = SimpleNamespace(run=run, rank_map=lambda layout: RankMap.block(layout, 2, rack_of_node))
    return selected_configs(context, None, LAYOUT, checkpoint)


@pytest.mark.parametrize(
    ("rack_of_node", "chosen", "why", "notes"),
    [((0, 1), KEPT, "was trained", 0), ((0, 0), {(0, 1, 2, 3): AllToAllConfig("flat")}, "nothing was measured", 1)],
    ids=["the same nodes", "other nodes"],
)
def test_what_auto_chose_is_kept_where_it_was_chosen(
    rack_of_node: tuple[int, ...], chosen: AllToAllConfigs, why: str, notes: int, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path)
    run.write_manifest({"job": {}})
    path = new_folder(run.checkpoints, 2)
    origin = Origin.of(MODEL, RankMap.block(LAYOUT, 2, (0, 1)), KEPT, seed=0, dtype="float32")
    Sidecar(2, 16, 2, origin, {}, ()).write(path)
    assert run_ranks(1, select, run, path, rack_of_node) == [chosen]
    (record,) = run.manifest()["job"]["all_to_all"]
    assert why in record["why"] and len(record["notes"]) == notes
    assert all("chosen anew" in note and str(path) in note for note in record["notes"])
