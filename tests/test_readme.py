"""Every command in the README is run: here where it is quick, else by the test or CI step that is named beside it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Commands that need root or take long: these places run them, some with fewer steps.
ELSEWHERE = {
    "make run": ".ci/run",
    "make test": ".ci/run",
    "source .venv/bin/activate": "Makefile",
    "python -m piper_hpc.launch": "tests/test_local_run.py, .ci/run",
    "python -m piper_hpc.launch tracking=wandb_offline train=smoke": "tests/test_local_run.py",
    "python -m piper_hpc.launch task=microbench": "tests/test_local_run.py",
    "python -m piper_hpc.launch task=microbench 'task.suites=[calibration,gemm,p2p,all_to_all]' task.cell_s=0.05": (
        "tests/test_local_run.py"
    ),
    "python -m piper_hpc.launch task=plan": "tests/test_local_run.py",
    "python -m piper_hpc.launch parallelism=auto train=smoke": "tests/test_local_run.py",
    "python -m piper_hpc.launch task=profile": "tests/test_local_run.py",
    "python -m piper_hpc.planner.benchmark": "tests/planner/test_fused_search.py",
    "python -m analysis.validate published": "tests/analysis/test_published_validate.py",
    "python -m piper_hpc.testbed up": "tests/slurm/test_testbed.py",
    "python -m piper_hpc.testbed status": "tests/slurm/test_testbed.py",
    "python -m piper_hpc.testbed down": "tests/slurm/test_testbed.py",
    "python -m piper_hpc.launch cluster=testbed": "tests/slurm/test_runs.py",
}


def commands() -> list[str]:
    """The lines of the README's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A place with a run in it, made by one of the README's own commands."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "README.md").write_text((ROOT / "README.md").read_text())
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python", f"not a command of the project: {command}"
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, timeout=240)


def test_what_is_run_elsewhere_is_still_in_the_readme():
    assert set(ELSEWHERE) <= set(commands())
    assert all((ROOT / place.split(",")[0]).exists() for place in ELSEWHERE.values())


def test_the_environment_is_entered_before_its_first_use():
    """After `make run` a bare `python` is still the system's, which knows nothing of this project."""
    in_order = commands()
    first = next(index for index, command in enumerate(in_order) if command.startswith("python "))
    assert in_order.index("make run") < in_order.index("source .venv/bin/activate") < first


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_every_other_command_of_the_readme_works_in_its_order(folder):
    rest = [command for command in commands() if command not in ELSEWHERE]
    assert len(rest) >= 8
    for command in rest:
        if "RUN_ID" in command:  # the one thing that a reader fills in
            (newest, *_) = sorted((folder / "runs").glob("2*"), reverse=True)
            command = command.replace("RUN_ID", newest.name)
        ended = run(command, folder)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
