"""A requeued job of a user's own goes on in the folder that its first attempt prepared."""

from __future__ import annotations

import pytest

from piper_hpc.runs import RunFolder, Status
from piper_hpc.submit.by_hand import job_around, requeued

JOB = {"SLURM_JOB_ID": "42", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/root"}
AGAIN = JOB | {"SLURM_RESTART_COUNT": "1"}
WORDS = ["cluster=slurm", "train=paper"]


@pytest.fixture
def prepared(tmp_path):
    run = RunFolder.create(tmp_path, "20260101-000000-a")
    run.write_manifest({})
    run.write_job(job_around(WORDS, JOB))
    return run


def test_what_is_recorded_of_the_job(prepared):
    job = prepared.job()
    assert (job["scheduler"], job["id"], job["environment"]) == ("slurm", "42", {"SLURM_CONF": "/etc/slurm.conf"})
    assert job_around(WORDS, {}) == {}


def test_the_same_job_and_words_give_the_same_folder(prepared):
    found = requeued(prepared.path.parent, WORDS, AGAIN)
    assert found is not None and found.path == prepared.path


def test_a_first_attempt_prepares_a_new_one(prepared):
    assert requeued(prepared.path.parent, WORDS, JOB) is None
    assert requeued(prepared.path.parent, WORDS, JOB | {"SLURM_RESTART_COUNT": "0"}) is None


def test_another_job_other_words_and_completed_runs_are_not_taken(prepared):
    runs = prepared.path.parent
    assert requeued(runs, WORDS, AGAIN | {"SLURM_JOB_ID": "43"}) is None
    assert requeued(runs, [*WORDS, "train.steps=3"], AGAIN) is None
    prepared.write_status(Status("failed", 0, "preempted", "by Slurm"))
    assert requeued(runs, WORDS, AGAIN) is not None
    prepared.write_status(Status("completed"))
    assert requeued(runs, WORDS, AGAIN) is None


def test_a_foreign_folder_beside_is_passed_over(prepared):
    torn = RunFolder.create(prepared.path.parent, "20250101-000000-b")
    torn.write_manifest({})
    (torn.path / "job.json").write_text("{")
    found = requeued(prepared.path.parent, WORDS, AGAIN)
    assert found is not None and found.path == prepared.path
