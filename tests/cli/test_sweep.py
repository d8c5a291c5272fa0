"""What the record says of a sweep: its name, and the values of what was swept, for whoever groups its runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cli.sweep import runs_of
from piper_hpc.runs import find


@pytest.mark.slow
def test_every_run_of_a_sweep_names_it_and_its_place_in_it(tmp_path: Path) -> None:
    def launch(*words: str) -> None:
        command = [sys.executable, "-m", "piper_hpc.launch", *words, "submit=false", "train=smoke"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=120, capture_output=True)

    launch("-m", "parallelism.micro_batch=1,2")
    launch()
    *swept, single = find(tmp_path / "runs")
    assert "sweep" not in single.manifest()
    (name,) = {run.manifest()["sweep"]["name"] for run in swept}
    points = runs_of([single, *reversed(swept)], name)
    sweeps = [run.manifest()["sweep"] for run in points]
    assert sweeps == [
        {"name": name, "index": index, "axes": {"parallelism.micro_batch": index + 1}} for index in range(2)
    ]
