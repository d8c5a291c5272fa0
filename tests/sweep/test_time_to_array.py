"""A thousand points from the command to sbatch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from piper_hpc.runs.sweeps import find_sweeps

BAR_S = {1000: 120.0, 100: 30.0}
SBATCH = "#!/bin/sh\ncat $1 > {seen}\ndate +%s.%N > {when}\necho Submitted batch job 77\n"
MODEL = ("cluster=frontier", "cluster.account=abc123", "model=mixtral_8x7b", "train=paper", "train.steps=20")
LAYOUT = ("parallelism.ep=8", "sweep.refuse_memory=false")
AXES = ("parallelism.pp=1,2,4,8", "parallelism.micro_batch=1,2,4", "parallelism.recompute=none,full")
LAYOUTS = 24


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("points", [pytest.param(1000, marks=pytest.mark.full), 100])
def test_many_points_reach_sbatch_checked_and_predicted(tmp_path: Path, points: int) -> None:
    commands, seen, when = tmp_path / "bin", tmp_path / "seen", tmp_path / "when"
    commands.mkdir()
    quiet = "#!/bin/sh\n"
    sbatch = SBATCH.format(seen=seen, when=when)
    for name, text in (("sbatch", sbatch), ("srun", quiet), ("sinfo", f"{quiet}echo 9000\n"), ("squeue", quiet)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}"}
    seeds = f"train.seed=range(0,{-(-points // LAYOUTS)})"
    began = time.time()
    command = [sys.executable, "-m", "piper_hpc.launch", "-m", *MODEL, *LAYOUT, *AXES, seeds]
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    took_s = float(when.read_text()) - began
    print(f"{points} points in {took_s:.1f} s")
    assert answer.returncode == 0, answer.stderr
    (sweep,) = find_sweeps(tmp_path / "runs")
    kept = sweep.points()
    assert len(kept) >= points and all(point.state == "new" and point.total_s for point in kept)
    assert len(list(tmp_path.glob("runs/*/prediction.json"))) == len(kept)
    assert "#SBATCH --array=0-" in seen.read_text() and 'export PIPER_STEP="srun ' in seen.read_text()
    assert took_s <= BAR_S[points]
