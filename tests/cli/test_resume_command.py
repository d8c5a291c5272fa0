"""`jobs resume` takes what may change of a run that goes on, refuses the rest, and then leaves all as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from piper_hpc.cli.resume import start, with_overrides
from piper_hpc.config import ConfigError
from piper_hpc.runs import RunFolder, Status

CONFIG = {
    "task": {"name": "train"},
    "parallelism": {"pp": 2, "ep": 2, "dp": 1, "placement": "pack"},
    "cluster": {"nodes": 1, "exclude": None},
    "train": {"steps": 5},
    "runs": "runs",
    "wait": True,
}


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["train.steps=9"], ("train", "steps"), 9),
        (["parallelism.pp=4"], ("parallelism", "dp"), None),
        (["parallelism.pp=4", "parallelism.dp=2"], ("parallelism", "dp"), 2),
        (["cluster.nodes=4"], ("parallelism", "dp"), None),
        (["parallelism=pp2_ep4"], ("parallelism", "ep"), 4),
        (["parallelism=auto"], ("parallelism", "auto"), True),
        (["parallelism=auto"], ("parallelism", "placement"), "pack"),
        (["+cluster.sbatch.network=x"], ("cluster", "sbatch"), {"network": "x"}),
        (["cluster.exclude=n[1-2]"], ("cluster", "exclude"), "n[1-2]"),
    ],
)
def test_what_may_change(words, key, value):
    assert with_overrides(CONFIG, words)[key[0]][key[1]] == value
    assert with_overrides(CONFIG, ["wait=false"]).wait is False


@pytest.mark.parametrize(
    ("word", "key", "rule"),
    [
        ("nonsense", "nonsense", "KEY=VALUE"),
        ("runs=elsewhere", "runs", "is kept"),
        ("task=microbench", "task", "is kept"),
        ("parallelism=nosuch", "parallelism", "names no file"),
        ("train=minute", "train", "single keys"),
        ("train.steps=[1", "train.steps", ""),
    ],
)
def test_what_may_not(word, key, rule):
    with pytest.raises(ConfigError) as refused:
        with_overrides(CONFIG, [word])
    (problem,) = refused.value.problems
    assert problem.key == key and rule in problem.rule


def test_a_run_that_is_not_over_is_left_alone(tmp_path: Path):
    run = RunFolder.create(tmp_path)
    run.write_config("train: {steps: 5}\n")
    run.write_job({"scheduler": "local", "id": "1", "host": "elsewhere", "environment": {}})
    run.write_status(Status("running"))
    before = sorted(path.name for path in run.path.iterdir())
    with pytest.raises(ConfigError, match=r"is running.*jobs cancel"):
        start(run, [])
    assert sorted(path.name for path in run.path.iterdir()) == before
