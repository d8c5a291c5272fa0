"""Which ends are tried again, by whom, and what the record says meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.runs import FAILURE_CLASSES, Failure, RunFolder, Status, attempts
from piper_hpc.runs.checkpoints import Origin, Sidecar, new_folder
from piper_hpc.runs.status import ADVICE
from piper_hpc.submit import evidence
from piper_hpc.submit.after import after
from piper_hpc.submit.going_on import close_before, go_on
from piper_hpc.submit.retry import IN_VAIN, ONCE, TAKEN, Decision, Ended, decide

RAN = "JobId=42 JobName=x JobState={state} Reason={reason} EndTime=2026-01-01T00:00:00 NodeList=n[1-2]"
TORN_BY_NODE = """\
srun: error: Node failure on n3
srun: error: n1: tasks 0-1: Terminated
slurmstepd: error: *** JOB 42 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***
"""


@given(
    ends=st.lists(
        st.builds(Ended, st.sampled_from([*FAILURE_CLASSES, None]), st.sampled_from([0, 0, 5])), min_size=1, max_size=9
    )
)
def test_no_class_is_tried_for_ever_without_new_steps(ends):
    """Whatever came before: never what would come again, and of the others no more than so many in a row."""
    *earlier, last = ends
    again = decide(earlier, last).again
    if last.failure_class not in (*ONCE, *TAKEN, "timeout"):
        assert not again
    elif last.failure_class == "timeout":
        assert again == (last.new_steps > 0)
    elif last.failure_class in ONCE:
        assert again == (not earlier or earlier[-1].failure_class not in ONCE)
    elif last.new_steps or len(ends) < IN_VAIN:
        assert again
    stuck = [Ended(last.failure_class, 0)] * (IN_VAIN + 1)
    assert not decide(stuck[:-1], stuck[-1]).again


def test_every_class_has_advice():
    assert ADVICE.keys() == FAILURE_CLASSES.keys()
    assert decide((), Ended("oom", 3)) == Decision(False, "it is not tried again: oom would come again")


@pytest.fixture
def run(tmp_path):
    run = RunFolder.create(tmp_path)
    run.write_config("cluster: {go_on: requeue}\n")
    run.write_manifest({})
    run.write_job({"scheduler": "slurm", "id": "42", "environment": {}})
    attempts.claim(run, "42.0.0", "42")
    run.write_status(Status("running", 0, step=7))
    return run


def commands(folder: Path, **scripts: str) -> dict[str, str]:
    """An environment in which each of these commands notes its words in `called`, and does what its script says."""
    folder.mkdir()
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/called\n{script}\n')
        path.chmod(0o755)
    return {"SLURM_JOB_ID": "42", "PATH": f"{folder}:/usr/bin:/bin"}


def called(folder: Path) -> str:
    path = folder / "called"
    return path.read_text() if path.exists() else ""


def checkpoint(run: RunFolder, step: int) -> None:
    path = new_folder(run.checkpoints, step)
    Sidecar(step, step, step, Origin(0, "float32", {}, {}, []), {}, ()).write(path)


def in_slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, **scripts: str) -> dict[str, str]:
    environ = commands(folder, **scripts)
    monkeypatch.setenv("PATH", environ["PATH"])
    return environ


def test_a_run_that_left_with_new_steps_is_requeued_and_keeps_how_it_ended(run, tmp_path, monkeypatch):
    environ = in_slurm(monkeypatch, tmp_path / "bin", scontrol="exit 0")
    checkpoint(run, 8)
    left = Status("failed", 0, "timeout", "left before the limit", 7)
    assert go_on(run, left, environ=environ).state == "pending"
    assert called(tmp_path / "bin") == "scontrol requeue 42\n"
    assert (run.status().state, run.status().step) == ("pending", 7)
    assert "timeout: left before the limit; goes on from step 8" in (run.status().reason or "")
    (first,) = attempts.history(run)
    assert (first["failure_class"], first["new_steps"]) == ("timeout", 8)
    # The next attempt saves nothing: the time limit would come again.
    attempts.claim(run, "42.0.1", "42")
    run.write_attempt(1, run.attempt(1) | {"from_step": 8})
    assert go_on(run, left, environ=environ).state == "failed"
    assert "no new step was saved" in (run.status().reason or "") and run.said_its_end()
    assert called(tmp_path / "bin").count("requeue") == 1


def test_where_requeue_is_refused_the_run_has_failed_and_says_why(run, tmp_path, monkeypatch):
    environ = in_slurm(monkeypatch, tmp_path / "bin", scontrol="echo 'Requested operation is disabled' >&2; exit 1")
    ended = go_on(run, Status("failed", 0, "preempted", "by others", 7), environ=environ)
    assert (ended.state, ended.failure_class) == ("failed", "preempted")
    assert "Requested operation is disabled" in (run.status().reason or "")


def test_a_chain_submits_the_same_script_to_follow_this_job_and_not_on_nodes_that_failed(run, tmp_path, monkeypatch):
    run.write_config("cluster: {go_on: chain}\n")
    run.batch.mkdir(parents=True)
    (run.batch / "42_submission.sh").write_text("#!/bin/bash\n")
    environ = in_slurm(
        monkeypatch, tmp_path / "bin", sbatch="env | grep -cE '^(SLURM_|TMPDIR|TORCH)' > $(dirname $0)/left; echo 43"
    )
    ended = Status("failed", 0, "node_fail", "n3 failed", 7)
    own = "/tmp/piper-x-0-y"  # this rank's, in which torch has its caches
    environ |= {"SLURM_CPU_BIND": "none", "TMPDIR": own, "TORCHINDUCTOR_CACHE_DIR": f"{own}/torchinductor"}
    assert go_on(run, ended, exclude=["n3"], environ=environ).state == "pending"
    script = run.batch / "42_submission.sh"
    assert called(tmp_path / "bin") == f"sbatch --parsable --dependency=afterany:42 --exclude=n3 {script}\n"
    assert run.job()["id"] == "43" and (tmp_path / "bin" / "left").read_text() == "0\n"


@pytest.mark.parametrize(
    ("state", "reason", "failure", "ends_as", "requeues"),
    [
        ("RUNNING", "None", Failure(1, "oom", "MemoryError: ", "", 1.0), ("failed", "oom"), False),
        ("RUNNING", "None", Failure(1, "comm", "closed", "", 1.0), ("pending", None), True),
        ("RUNNING", "None", Failure(1, "numerical", "step 2: not finite", "", 1.0), ("failed", "numerical"), False),
        ("COMPLETING", "TimeLimit", None, ("failed", "timeout"), False),
        ("COMPLETING", "None", None, ("running", None), False),
    ],
    ids=["no memory", "a lost peer", "not finite", "no step saved before the limit", "cancelled"],
)
def test_the_end_of_the_batch_script(run, state, reason, failure, ends_as, requeues, tmp_path, monkeypatch):
    answer = RAN.format(state=state, reason=reason)
    script = f'case "$*" in *show*) echo "{answer}";; esac'
    environ = in_slurm(monkeypatch, tmp_path / "bin", scontrol=script, sinfo="echo n1 idle; echo n2 mixed")
    if failure is not None:
        run.write_failure(failure, 0)
    status = after(run, environ)
    assert (status.state, status.failure_class) == ends_as
    assert ("requeue" in called(tmp_path / "bin")) == requeues


def test_a_node_that_is_down_is_the_cause_and_is_left_out(run, tmp_path, monkeypatch):
    answer = RAN.format(state="RUNNING", reason="None")
    script = f'case "$*" in *show*) echo "{answer}";; esac'
    environ = in_slurm(monkeypatch, tmp_path / "bin", scontrol=script, sinfo="echo n1 mixed; echo 'n2 down*'")
    run.write_failure(Failure(0, "hang", "RuntimeError: Timed out waiting", "", 1.0), 0)
    assert after(run, environ).state == "pending"
    assert attempts.history(run)[0]["failure_class"] == "node_fail"
    assert "ExcNodeList=n2" in called(tmp_path / "bin")


def test_what_slurm_printed_tells_who_ended_first():
    killed = "srun: error: n2: task 1: Out Of Memory\nsrun: error: n1: task 0: Terminated\n"
    assert evidence.read(killed).first_killed == ("n2", "1", "Out Of Memory") and evidence.read(killed).oom
    assert evidence.read("srun: error: n1: task 0: Exited with exit code 1\n").first_killed is None
    node = evidence.read(TORN_BY_NODE)
    assert node.failed_nodes == ("n3",) and "NODE FAILURE" in node.causes[0]


def test_what_an_attempt_before_printed_is_not_this_ones(run):
    path = run.logs / "slurm-42.out"
    path.write_text(TORN_BY_NODE)
    attempts.claim(run, "42.0.1", "42", path.stat().st_size)
    assert evidence.printed(run, 0).failed_nodes == ("n3",) and not evidence.printed(run, 1).failed_nodes
    close_before(run, 1)
    assert attempts.history(run)[0]["failure_class"] == "node_fail"


def test_without_an_answer_of_slurm_the_record_stands(run, tmp_path, monkeypatch):
    environ = in_slurm(monkeypatch, tmp_path / "bin", scontrol="exit 1")
    monkeypatch.setattr("piper_hpc.submit.after.CONTROLLER_S", 0.0)
    assert after(run, environ).state == "running"
    shutil.rmtree(tmp_path / "bin")
