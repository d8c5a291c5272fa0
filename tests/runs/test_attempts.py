"""Attempts are numbered by the record, whatever jobs and requeues made them; rows of two never join."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.runs import RunFolder, Status
from piper_hpc.runs.attempts import claim, close, history, joined


@pytest.fixture
def run(tmp_path):
    return RunFolder.create(tmp_path)


def test_a_new_job_in_an_old_folder_is_a_new_attempt(run):
    assert claim(run, "42.0.0", "42") == 0
    assert claim(run, "42.0.0", "42") == 0, "the same ranks, again"
    assert claim(run, "42.0.1", "42") == 1, "requeued"
    assert claim(run, "43.0.0", "43") == 2, "another job, whose own count begins anew"
    assert joined(run, "43.0.0", ranks=8) == 2
    with pytest.raises(RuntimeError, match="began no attempt"):
        joined(run, "44.0.0", ranks=8, timeout_s=0.0)


def test_an_older_records_attempts_count(run):
    run.log(0, 3).touch()
    run.log(1, 3).touch()
    assert claim(run, "42.0.0", "42") == 2


def test_jobs_that_begin_at_once_get_numbers_of_their_own(run):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda job: claim(run, f"{job}.0.0", str(job)), range(8)))
    assert sorted(found) == list(range(8))


def test_history_keeps_how_each_attempt_ended(run):
    claim(run, "42.0.0", "42")
    close(run, 0, Status("failed", 0, "node_fail", "n3 failed", 7, evidence=("srun said so",)), nodes=["n3"])
    claim(run, "42.0.1", "42")
    first, second = history(run)
    assert (first["attempt"], first["failure_class"], first["step"], first["nodes"]) == (0, "node_fail", 7, ["n3"])
    assert first["evidence"] == ["srun said so"] and first["key"] == "42.0.0"
    assert second["attempt"] == 1 and "failure_class" not in second


@given(whole=st.integers(0, 3), torn=st.sampled_from(['{"st', "x" * 9000, '{"step": 3, "attempt": 0}', ""]))
def test_a_torn_last_line_never_joins_the_next_row(tmp_path_factory, whole, torn):
    run = RunFolder.create(tmp_path_factory.mktemp("runs"))
    for step in range(whole):
        run.append_metrics({"step": step})
    path = run.path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    run.append_metrics({"step": whole}, attempt=1)
    assert [(row["step"], row["attempt"]) for row in run.metrics()] == [
        *((step, 0) for step in range(whole)),
        (whole, 1),
    ]
    assert all(json.loads(line) for line in path.read_text().splitlines())
