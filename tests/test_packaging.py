"""What is installed from a wheel works as the checkout does: configuration and templates travel with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run(installed: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-m", "piper_hpc.launch", *arguments]
    ended = subprocess.run(command, cwd=installed, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout


def test_the_wheel_plans_with_its_own_configuration(installed):
    assert (installed / "piper_hpc" / "_data" / "conf" / "config.yaml").is_file()
    assert json.loads(run(installed, "task=plan", "experiment=paper_mixtral", "format=json"))["feasible"] > 0


def test_the_wheel_renders_its_own_batch_script(installed):
    text = run(installed, "experiment=paper_mixtral", "parallelism=auto", "dry_run=true")
    assert "module load rccl-net-plugin" in text
