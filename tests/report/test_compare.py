"""Two runs compared: what changed is named, and a difference counts once it is more than runs repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piper_hpc.jobs import main as jobs
from piper_hpc.report.compare import compare
from piper_hpc.runs import RunFolder, find
from tests.finished_run import make_run, metrics_row, prediction, untimed


def a_run(root: Path, slow: float, seed: int, *, identity: str = "", scatter: float = 0.0) -> RunFolder:
    rows = [metrics_row(step, slow=slow * (1 + scatter * (step % 3 - 1))) for step in range(32)]
    run = make_run(root, rows, prediction())
    config = run.config()
    run.write_config(json.dumps(config | {"train": config["train"] | {"seed": seed}}))
    manifest = run.manifest()
    job = manifest["job"] | {"environment": {"NCCL_NET": "OFI" if seed else "Socket", "SLURM_JOB_ID": str(slow)}}
    run.write_manifest(manifest | {"identity": identity or f"of seed {seed}", "job": job})
    return run


def test_what_changed_is_named_and_what_did_not_is_not(tmp_path):
    a, b = a_run(tmp_path, 1.0, 0), a_run(tmp_path, 1.2, 1)
    found = compare(a, b, find(tmp_path))
    assert [(one.kind, one.key, one.a, one.b) for one in found.changes] == [
        ("config", "train.seed", 0, 1),
        ("environment", "NCCL_NET", "Socket", "OFI"),
    ]
    by_key = {one.key: one for one in found.differences}
    assert by_key["step_time_s"].difference_pct == pytest.approx(20) and by_key["step_time_s"].differs
    assert by_key["attention_s"].differs and not by_key["peak_memory_bytes"].differs
    assert found.repeat_pct is None and found.repeats == 0


@pytest.mark.parametrize(("slower", "differs"), [(1.02, False), (1.5, True)])
def test_a_difference_counts_once_it_is_more_than_runs_repeat(tmp_path, slower, differs):
    a = a_run(tmp_path, 1.0, 0)
    for again in (0.9, 1.1):  # A's configuration repeats to a tenth
        a_run(tmp_path, again, 0)
    b = a_run(tmp_path, slower, 1)
    found = compare(a, b, find(tmp_path))
    step = next(one for one in found.differences if one.key == "step_time_s")
    assert found.repeats == 2 and found.repeat_pct == pytest.approx(10)
    assert step.differs is differs and step.noise_pct == pytest.approx(2 * 2**0.5 * 10)


def test_steps_that_scatter_are_noise_too(tmp_path):
    a, b = a_run(tmp_path, 1.0, 0, scatter=0.3), a_run(tmp_path, 1.05, 1, scatter=0.3)
    step = next(one for one in compare(a, b, []).differences if one.key == "step_time_s")
    assert not step.differs and step.noise_pct > 5


def test_the_command_says_what_the_noise_rests_on(tmp_path, monkeypatch, capsys):
    a, b = a_run(tmp_path, 1.0, 0), a_run(tmp_path, 1.2, 0)
    words = ["jobs", "compare", "--runs", str(tmp_path), a.run_id, b.run_id]
    monkeypatch.setattr("sys.argv", words)
    assert jobs() == 0
    text = capsys.readouterr().out
    assert "nothing changed" in text and "these two, of one configuration" in text and "+20.0 %" in text
    monkeypatch.setattr("sys.argv", [*words, "--json"])
    assert jobs() == 0
    assert json.loads(capsys.readouterr().out)["repeat_pct"] > 5
    bare = make_run(tmp_path, [untimed(metrics_row(step)) for step in range(4)], None)
    monkeypatch.setattr("sys.argv", ["jobs", "compare", "--runs", str(tmp_path), a.run_id, bare.run_id])
    assert jobs() == 0  # without terms, prediction and identity the step is still compared
    assert "attention" not in capsys.readouterr().out
    empty = make_run(tmp_path, [], None)
    monkeypatch.setattr("sys.argv", ["jobs", "compare", "--runs", str(tmp_path), a.run_id, empty.run_id])
    assert jobs() == 2
    assert "took steps" in capsys.readouterr().err
