"""What is submitted is the text that a dry run shows; nothing is pickled; and submitit still has the hooks used."""

from __future__ import annotations

import inspect
import os
import shlex
import sys
from pathlib import Path

import pytest
import submitit
from submitit.local.local import LocalExecutor, LocalJob

from piper_hpc.config import ConfigError
from piper_hpc.runs import RunFolder
from piper_hpc.submit.executors import preview, submit
from tests.presets import experiment

FAKE = """#!/bin/sh
env | grep ^SLURM_ > {seen}.environment
cp "$1" {seen}
echo {answer}
exit {code}
"""


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put a fake sbatch first on the PATH; returns where the script that it was given is kept."""

    def put(answer: str = "Submitted batch job 77", code: int = 0) -> Path:
        folder, seen = tmp_path / "bin", tmp_path / "script"
        folder.mkdir(exist_ok=True)
        for name in ("sbatch", "srun"):
            text = FAKE.format(seen=shlex.quote(str(seen)), answer=shlex.quote(answer), code=code)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return seen

    return put


def study(run_path: str) -> None:
    """Work of a study's own."""


def prepared(tmp_path: Path) -> tuple[RunFolder, object]:
    cluster = experiment("task=plan", "cluster=slurm", "cluster.nodes=2", "cluster.memory_gib_per_rank=64").cluster
    return RunFolder.create(tmp_path / "runs of mine"), cluster


def test_what_slurm_is_given_is_what_the_dry_run_showed(tmp_path, sbatch):
    seen = sbatch()
    run, cluster = prepared(tmp_path)
    submit(run, cluster, environment={"SLURM_CONF": "/bed/slurm.conf"}, wait=True, placement={})
    assert seen.read_text() == preview(run.path, cluster, {})
    assert run.job() | {"schema_version": 1} == {
        "schema_version": 1,
        "scheduler": "slurm",
        "id": "77",
        "environment": {"SLURM_CONF": "/bed/slurm.conf"},
    }


def test_nothing_is_pickled_and_ranks_start_the_worker(tmp_path, sbatch):
    seen = sbatch()
    run, cluster = prepared(tmp_path)
    submit(run, cluster, environment={}, wait=True, placement={}, work=study)
    assert not [path for path in run.path.rglob("*") if path.suffix == ".pkl"]
    (line,) = (line for line in seen.read_text().splitlines() if line.startswith("PIPER_COMMAND="))
    words = shlex.split(shlex.split(line.removeprefix("PIPER_COMMAND="))[0])
    assert words == [sys.executable, "-u", "-m", "piper_hpc.worker", str(run.path), f"{__name__}:study"]


def test_an_outer_job_is_not_seen_by_sbatch(tmp_path, sbatch, monkeypatch):
    seen = sbatch()
    run, cluster = prepared(tmp_path)
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    submit(run, cluster, environment={"SLURM_CONF": "/bed/slurm.conf"}, wait=True, placement={})
    assert seen.with_suffix(".environment").read_text() == "SLURM_CONF=/bed/slurm.conf\n"
    assert os.environ["SLURM_CPU_BIND"] == "quiet,mask_cpu:0x1"


def test_where_the_users_shell_finds_slurm_sbatch_and_later_commands_do(tmp_path, sbatch, monkeypatch):
    seen = sbatch()
    run, cluster = prepared(tmp_path)
    monkeypatch.setenv("SLURM_CONF", "/site/slurm.conf")
    submit(run, cluster, environment={}, wait=True, placement={})
    assert seen.with_suffix(".environment").read_text() == "SLURM_CONF=/site/slurm.conf\n"
    assert run.job()["environment"] == {"SLURM_CONF": "/site/slurm.conf"}


def test_a_refusal_says_what_sbatch_said(tmp_path, sbatch):
    sbatch("sbatch: error: Invalid account", code=1)
    run, cluster = prepared(tmp_path)
    with pytest.raises(ConfigError, match="sbatch refused the job"):
        submit(run, cluster, environment={}, wait=True, placement={})
    assert not run.job()


def test_submitit_has_the_hooks_that_are_used():
    assert list(inspect.signature(submitit.SlurmExecutor._submit_command).parameters) == ["self", "command"]
    made = inspect.signature(submitit.SlurmExecutor._make_submission_file_text)
    assert list(made.parameters) == ["self", "command", "uid"]
    assert "folder" in inspect.signature(LocalExecutor.__init__).parameters
    assert list(inspect.signature(LocalJob.__init__).parameters)[:5] == ["self", "folder", "job_id", "tasks", "process"]
