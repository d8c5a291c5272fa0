"""A new user's first hour on a Slurm of their own, as one test; nothing in the checkout is edited.

The checkout lies under a path with a blank, the site's files outside of it; the Slurm has no accounting, and gives a
cancelled job the usual thirty seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from piper_hpc.runs import RunFolder, find
from piper_hpc.testbed import state
from piper_hpc.testbed.state import Testbed
from tests.live import SECONDS_TO_START, until
from tests.slurm.machine import CHECKOUT, run_testbed

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.untimed, pytest.mark.timeout(900)]

PARTS = ("piper_hpc", "conf", "sbatch_templates", "analysis", "pyproject.toml", "README.md")
SITE = ("--nodes", "2", "--kill-wait-s", "30", "--accounting", "off")
# Slow links are measured truly beside other tests.
LINKS = ("--node-mbit-per-s", "400", "--nic-mbit-per-s", "100", "--rack-mbit-per-s", "100")


@pytest.fixture
def site(testbed: Testbed, testbed_is_ours: bool) -> Iterator[Testbed]:
    """A Slurm without accounting in place of the session's, which comes back afterwards."""
    if not testbed_is_ours:
        pytest.skip("a testbed was up, and stays as it is; to run this: python -m piper_hpc.testbed down")
    assert run_testbed("down").returncode == 0
    try:
        up = run_testbed("up", *SITE, *LINKS)
        assert up.returncode == 0, up.stderr
        found = state.load()
        assert found is not None
        yield found
    finally:
        run_testbed("down")
        back = run_testbed("up")
    assert back.returncode == 0, back.stderr


class User:
    """Types commands in the checkout."""

    def __init__(self, checkout: Path, variables: dict[str, str]) -> None:
        self.checkout = checkout
        self._environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables

    def types(self, module: str, *words: str, code: int = 0) -> str:
        """`python -m piper_hpc.MODULE ...`; what it prints. It must end with `code`."""
        answer = subprocess.run(
            [sys.executable, "-m", f"piper_hpc.{module}", *words],
            cwd=self.checkout,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert answer.returncode == code, f"{module} {' '.join(words)}\n{answer.stdout}{answer.stderr}"
        assert "Traceback" not in answer.stdout + answer.stderr
        return answer.stdout + answer.stderr


def test_from_a_clone_to_a_cancelled_run(site: Testbed, tmp_path: Path) -> None:
    checkout, own = tmp_path / "my clone" / "piper hpc", tmp_path / "my site"
    for part in PARTS:
        if (CHECKOUT / part).is_dir():
            shutil.copytree(CHECKOUT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(CHECKOUT / part, checkout / part)
    user = User(checkout, {"SLURM_CONF": site.slurm_conf, "PIPER_CONF": str(own)})

    # What sinfo tells becomes the site's files; what it does not, the user completes.
    assert "wrote" in user.types("doctor", "--write", str(own / "mybed.yaml"))
    written = own / "cluster" / "mybed.yaml"
    cluster = yaml.safe_load(written.read_text())
    assert (cluster["ranks_per_node"], cluster["partition"]) == (2, "batch")
    cluster |= {"memory_gib_per_rank": 1.5, "environment": {"GLOO_SOCKET_IFNAME": "eth0"}}
    written.write_text(yaml.safe_dump(cluster))
    assert "failed" not in user.types("doctor", "cluster=mybed", "on=nodes").replace("nothing failed", "")

    shown = user.types("launch", "cluster=mybed", "task=microbench", "dry_run=true")
    assert str(own) in shown and f'--output="{checkout}/runs/' in shown and "nothing submitted" in shown
    assert find(checkout / "runs") == []

    user.types("launch", "cluster=mybed", "task=microbench", "task.budget_s=6")
    user.types("launch", "cluster=mybed", "task=plan", "train=smoke", "plan.save=best")
    launched = user.types("launch", "cluster=mybed", "parallelism=best", "train=smoke", "wait=false", "format=json")
    run = RunFolder(json.loads(launched[launched.index("{") : launched.rindex("}") + 1])["path"])
    assert run.prediction() is not None  # from what was measured
    assert "completed" in user.types("jobs", "wait", run.run_id)
    assert len(run.metrics()) == run.config()["train"]["steps"]
    assert (checkout / "runs").resolve() == run.path.parent

    endless = ("cluster=mybed", "parallelism=best", "train=smoke", "train.steps=100000", "wait=false")
    user.types("launch", *endless)
    second = find(checkout / "runs")[-1]
    until(lambda: len(second.metrics()) > 1, SECONDS_TO_START, "training starts")
    assert second.run_id in user.types("jobs", "list") and "running" in user.types("jobs", "status", "latest")
    assert "cancel" in user.types("jobs", "cancel", "latest")
    user.types("jobs", "wait", "latest", code=1)
    assert "cancelled" in user.types("jobs", "status", "latest")
    assert not list((checkout / "runs").rglob("*.pkl"))
