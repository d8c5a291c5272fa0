"""Strings that reach a batch script: refused with a value that works, or carried there unchanged."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.config import ConfigError
from piper_hpc.runs import RunFolder
from piper_hpc.submit.script import directives, render, script
from tests.presets import experiment

SLURM = ("task=plan", "cluster=slurm")


def refused(*overrides: str) -> dict[str, tuple[Any, str, str]]:
    """Key -> (value, rule, what works)."""
    with pytest.raises(ConfigError) as caught:
        experiment(*SLURM, *overrides)
    return {problem.key: (problem.value, problem.rule, problem.works) for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("override", "key", "works"),
    [
        ('cluster.account="a\ntouch /tmp/x"', "cluster.account", "cluster.account=abc123"),
        ('cluster.partition="batch; rm"', "cluster.partition", "cluster.partition=batch"),
        ("cluster.constraint='$(id)'", "cluster.constraint", "cluster.constraint=gpu"),
        ("+cluster.sbatch.time=5", "cluster.sbatch.time", "~cluster.sbatch.time"),
        ("+cluster.sbatch.array=0-3", "cluster.sbatch.array", "~cluster.sbatch.array"),
        ("+cluster.sbatch.comment='two words'", "cluster.sbatch.comment", "cluster.sbatch.comment=null"),
        ("+cluster.environment.A-B=1", "cluster.environment", "+cluster.environment.NCCL_DEBUG=INFO"),
        ('+cluster.environment.A="x\ny"', "cluster.environment.A", "cluster.environment.A=INFO"),
        ("cluster.modules=['a b']", "cluster.modules", "cluster.modules=[rocm/7.1.1]"),
        ("cluster.gpus_per_task=1", "cluster.gpus_per_task", "cluster.gpus_per_task=0"),
    ],
)
def test_what_would_become_a_line_of_shell_is_refused(override: str, key: str, works: str) -> None:
    found = refused(override)
    assert list(found) == [key] and found[key][2] == works


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD", "aws_secret"])
def test_a_secret_is_refused_and_not_shown(name: str) -> None:
    found = refused(f"+cluster.environment.{name}=hunter2")
    value, rule, works = found[f"cluster.environment.{name}"]
    assert "hunter2" not in f"{value} {rule} {works}" and works.startswith(f"export {name}=")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+cluster.sbatch.export='ALL,WANDB_API_KEY=hunter2'", "cluster.sbatch.export"),
        ("+cluster.sbatch.comment='A_TOKEN=hunter2'", "cluster.sbatch.comment"),
        ("cluster.container='apptainer exec --env HF_TOKEN=hunter2 a.sif'", "cluster.container"),
        ("+cluster.environment.HTTPS_PROXY='http://ada:hunter2@proxy:3128'", "cluster.environment.HTTPS_PROXY"),
        ("+cluster.environment.AN_API_KEY=17", "cluster.environment.AN_API_KEY"),
        ("tracking.entity='${oc.env:A_SERVICE_TOKEN}'", "tracking.entity"),
        ("tracking.project='https://ada:hunter2@host/x'", "tracking.project"),
        ("cluster.modules=['x/MY_SECRET=hunter2']", "cluster.modules"),
        ("runs='/scratch/ACCESS_TOKEN=hunter2'", "runs"),
        ("+wandb_api_key=hunter2", "wandb_api_key"),
    ],
)
def test_no_key_carries_a_secret(override: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys of a configuration reach config.yaml, those of `cluster` the script, and all of them a tracker."""
    monkeypatch.setenv("A_SERVICE_TOKEN", "hunter2-hunter2-hunter2")
    found = refused(override)
    assert list(found) == [key] and found[key][0] == "(not shown)"
    assert "hunter2" not in str(found)


def test_every_key_of_a_site_becomes_its_option() -> None:
    cluster = experiment(
        *SLURM,
        *("cluster.qos=regular", "cluster.constraint='gpu&hbm80g'", "cluster.mem=450G", "cluster.gres=gpu:4"),
        *("cluster.exclude='n[1-4]'", "cluster.reservation=mine", "cluster.requeue=false", "cluster.account=abc"),
        *("+cluster.sbatch.network=disable_rdzv_get", "+cluster.sbatch.contiguous=null"),
    ).cluster
    found = directives(cluster, RunFolder("/runs/r1"))
    assert {key: found[key] for key in ("qos", "constraint", "mem", "gres", "exclude", "reservation", "account")} == {
        "qos": "regular", "constraint": "gpu&hbm80g", "mem": "450G", "gres": "gpu:4", "exclude": "n[1-4]",
        "reservation": "mine", "account": "abc",
    }  # fmt: skip
    assert (found["no-requeue"], found["contiguous"], found["network"]) == ("", "", "disable_rdzv_get")
    assert found["gpus-per-node"] == "4" and "gpus-per-task" not in found and "requeue" not in found


def test_modules_and_container_come_before_the_ranks() -> None:
    cluster = experiment(
        *SLURM, "cluster.modules=[rocm/7.1.1,rccl]", "cluster.container='apptainer exec a.sif'"
    ).cluster
    lines = script(cluster, RunFolder("/runs/r1"), "python", "python -m work").splitlines()
    assert "PIPER_COMMAND='apptainer exec a.sif python -m work'" in lines
    assert lines.index("module load rocm/7.1.1 rccl") < lines.index("set -euo pipefail")


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["C"]), max_size=40))
def test_a_variable_has_in_the_job_the_value_that_it_was_given(value: str) -> None:
    text = render('#!/bin/bash\n#SBATCH --time=5\nprintf %s "$A"\n', {}, "py", "py", {"A": value})
    answer = subprocess.run(["bash", "-s"], input=text, capture_output=True, text=True, check=True)
    assert answer.stdout == value


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="/\0"), min_size=1, max_size=20))
def test_a_folder_with_any_name_stays_one_word(name: str) -> None:
    cluster = experiment_of_generic()
    (line,) = (
        line
        for line in script(cluster, RunFolder(f"/a/{name}"), "py", "py").splitlines()
        if line.startswith("#SBATCH --output=")
    )
    word = line.removeprefix("#SBATCH --output=")
    plain = word[1:-1].replace('\\"', '"').replace("\\\\", "\\") if word.startswith('"') else word
    assert plain == f"/a/{name}/logs/slurm-%j.out".replace("%", "%%").replace("%%j", "%j")


_GENERIC: list[Any] = []


def experiment_of_generic() -> Any:
    """Composed once."""
    if not _GENERIC:
        _GENERIC.append(experiment(*SLURM).cluster)
    return _GENERIC[0]
