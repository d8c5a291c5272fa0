"""A sweep on this machine: the best layouts of a plan, interrupted, resumed, and told what trusting the plan costs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cli.errors import INTERRUPTED
from piper_hpc.cluster import calibration
from piper_hpc.runs import find
from piper_hpc.runs.sweeps import find_sweeps
from tests.live import SECONDS_TO_START, started, until
from tests.resource_model import clusters


@pytest.mark.processes
def test_the_best_layouts_of_a_plan_run_one_after_the_other_and_the_regret_is_told(tmp_path: Path) -> None:
    calibration.save(clusters.calibration(), tmp_path / "made_up.json")
    words = ("sweep=plan", "sweep.top=2", "train=smoke", "train.steps=15", "cluster.ranks_per_node=2")
    with started(*words, "cluster.calibration=made_up.json", cwd=tmp_path) as launcher:
        until(lambda: any(len(run.metrics()) > 1 for run in find(tmp_path / "runs")), SECONDS_TO_START, "steps")
        launcher.send_signal(signal.SIGINT)
        output, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == INTERRUPTED, output + errors
    (sweep,) = find_sweeps(tmp_path / "runs")
    assert f"jobs resume {sweep.name}" in output

    def jobs(name: str) -> dict[str, object]:
        answer = subprocess.run(
            [sys.executable, "-m", "piper_hpc.jobs", name, sweep.name, "--json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)  # type: ignore[no-any-return]

    assert jobs("status")["totals"]["by_state"] == {"pending": 2}  # type: ignore[index]
    document = jobs("resume")
    assert [point["state"] for point in document["points"]] == ["completed"] * 2  # type: ignore[attr-defined]
    first, second = (point["step_s"] for point in document["points"])  # type: ignore[attr-defined]
    assert document["regret"]["pct"] == pytest.approx(100 * max(0, first / second - 1))  # type: ignore[index]
    assert len(sweep.claims()[0]) == 2  # interrupted, and taken up again
