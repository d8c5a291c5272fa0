"""One testbed for all tests on a real Slurm: brought up once with default options, taken down at the end."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from piper_hpc.runtime import quota
from piper_hpc.testbed import lifecycle, options, state
from piper_hpc.testbed.state import Testbed
from tests.slurm.machine import run_testbed, traces


@pytest.fixture(scope="session")
def testbed_is_ours() -> bool:
    """Whether this session brought the testbed up itself, and may therefore take it down."""
    return state.load() is None


@pytest.fixture(scope="session")
def machine_before(testbed_is_ours: bool) -> dict[str, Any]:
    """The machine's traces before any test of this session brought a testbed up, and without what a killed one left."""
    if testbed_is_ours and os.geteuid() == 0:
        assert run_testbed("down").returncode == 0
    return traces()


@pytest.fixture(scope="session")
def testbed(machine_before: dict[str, Any], testbed_is_ours: bool) -> Iterator[Testbed]:
    """The testbed with default options. One that is up already is used as it is, and left up."""
    if os.geteuid() != 0:
        pytest.skip("the testbed needs root")
    missing = lifecycle.packages_missing()
    if missing:
        pytest.skip(f"the testbed needs Debian packages: {' '.join(missing)} (make testbed-packages)")
    if not quota.writable():
        pytest.skip("the testbed needs writable control groups: in a container, mount /sys/fs/cgroup writable")
    present = state.load()
    if present is not None and present.options != options.parse({}).document():
        pytest.skip("a testbed with other options is up: python -m piper_hpc.testbed down")
    answer = run_testbed("up", "--json")
    assert answer.returncode == 0, answer.stderr
    found = state.load()
    assert found is not None
    yield found
    if testbed_is_ours:
        assert run_testbed("down").returncode == 0


@pytest.fixture(autouse=True)
def nodes_stay_in_service(request: pytest.FixtureRequest) -> Iterator[None]:
    """A node whose killed ranks ended too late for Slurm is drained, and every later test would wait for it."""
    yield
    if "testbed" not in request.fixturenames or (found := state.load()) is None:
        return
    environment = {**os.environ, **found.environment}
    reasons = ["sinfo", "--noheader", "--list-reasons", "--format=%N"]
    drained = subprocess.run(reasons, env=environment, capture_output=True, text=True, check=False).stdout.split()
    for nodes in drained:
        subprocess.run(["scontrol", "update", f"NodeName={nodes}", "State=RESUME"], env=environment, check=False)


@pytest.fixture
def slurm(testbed: Testbed) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of Slurm's commands as a user would: with the testbed's environment, and nothing else."""

    def run(*command: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **testbed.environment}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)

    return run
