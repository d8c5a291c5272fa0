"""What is installed from a wheel works as the checkout does: configuration and templates travel with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # builds, installs and launches


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


def test_the_source_distribution_has_what_its_tests_and_pages_need(tmp_path):
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    wanted = {"LICENSE", "CITATION.cff", "CONTRIBUTING.md", "CHANGELOG.md", "README.md", "Makefile", ".importlinter"}
    assert names >= wanted | {"docs/tutorial.md", "docs/report.png", "tests/test_docs.py"}


def test_the_wheel_carries_the_licence(installed):
    (licence,) = installed.glob("piper_hpc-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()


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
