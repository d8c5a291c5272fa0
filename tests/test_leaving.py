"""When a run saves and leaves: by the job's end, however often that moves, and by signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from piper_hpc.submit.scheduler import JobFacts
from piper_hpc.tasks import leaving
from piper_hpc.tasks.leaving import Leaving

Say = Callable[..., None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    now = {"s": 1000.0}
    monkeypatch.setattr(leaving.time, "time", lambda: now["s"])
    before = signal.getsignal(signal.SIGUSR1)
    yield now
    signal.signal(signal.SIGUSR1, before)


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """What the controller says from now on."""

    def saying(end_s: float | None, **others: Any) -> None:
        facts = replace(JobFacts("RUNNING", "None", end_s, preempted=False, nodes="n1"), **others)
        monkeypatch.setattr(leaving, "nodes_down", lambda nodes, environment: {})
        monkeypatch.setattr(leaving, "job_facts", lambda job_id, environment: facts)

    return saying


def test_it_leaves_while_a_step_a_checkpoint_and_the_margin_still_fit(clock: dict[str, float], say: Say) -> None:
    say(2000.0)
    mine = Leaving(job_id="42", margin_s=30.0)
    assert not mine.asked(needed_s=20.0)
    clock["s"] = 2000.0 - 30.0 - 20.0 - 0.1
    assert not mine.asked(needed_s=20.0)
    assert mine.asked(needed_s=20.2)
    left = mine.why(done=7, steps=9)
    assert (left.failure_class, left.reason) == ("timeout", "left 50 s before the time limit: 7 of 9 steps are done")


def test_a_limit_that_was_raised_meanwhile_is_asked_for_again(clock: dict[str, float], say: Say) -> None:
    say(2000.0)
    mine = Leaving(job_id="42", margin_s=30.0)
    say(9000.0)
    clock["s"] = 1990.0
    assert not mine.asked(needed_s=20.0)


def test_ranks_without_a_clock_and_jobs_without_an_end_go_on(clock: dict[str, float], say: Say) -> None:
    say(None)
    clock["s"] = 1e9
    assert not Leaving(job_id=None, margin_s=30.0).asked(1e6)
    assert not Leaving(job_id="42", margin_s=30.0).asked(1e6)


@pytest.mark.parametrize(
    ("said", "state", "failure_class"),
    [
        ({"end_s": 9000.0}, "completed", None),
        ({"end_s": 9000.0, "preempted": True}, "completed", "preempted"),
        ({"end_s": 1150.0}, "completed", "timeout"),
        ({"end_s": 1000.0, "state": "COMPLETING", "reason": "TimeLimit"}, "completed", "timeout"),
        ({"end_s": 1000.0, "state": "CANCELLED"}, "cancelled", None),
        ({"end_s": 1000.0, "state": "COMPLETING", "restarts": 1}, "pending", "node_fail"),
    ],
    ids=["a user asks", "preempted", "Slurm warns of the limit", "the limit itself", "cancelled", "a node failed"],
)
def test_why_a_signal_came(said, state, failure_class, clock: dict[str, float], say: Say, tmp_path: Path) -> None:
    say(**{"end_s": 9000.0})
    mine = Leaving(job_id="42", margin_s=30.0, causes=lambda output: ["NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS"])
    os.kill(os.getpid(), signal.SIGUSR1)
    assert mine.asked(1.0)
    say(**said)
    left = mine.why(3, 9)
    assert (left.state, left.failure_class) == (state, failure_class) and "3 of 9 steps are done" in left.reason
