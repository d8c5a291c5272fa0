"""A view that fails, hangs or cannot be imported ends no training, and says what to do instead."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from piper_hpc.tracking import GuardedTracker, NoTracker, make
from piper_hpc.tracking.guard import LIMIT_S


class Shown(NoTracker):
    """A view that keeps what it was shown, and fails where it is asked to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.rows: list[int] = []
        self.ended: list[str] = []
        self.fails_at = fails_at

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] == self.fails_at:
            raise OSError("No space left on device")
        self.rows.append(row["step"])

    def finish(self, status: str) -> None:
        self.ended.append(status)


def train(tracker: GuardedTracker, run_dir: Path) -> None:
    tracker.start({}, run_dir)
    for step in range(3):
        tracker.log({"step": step})
    tracker.finish("completed")


def test_a_view_that_works_is_shown_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown()
    train(GuardedTracker(lambda: shown), tmp_path)
    assert (shown.rows, shown.ended, capsys.readouterr().err) == ([0, 1, 2], ["completed"], "")


def test_a_view_that_fails_is_told_once_and_shown_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown(fails_at=1)
    train(GuardedTracker(lambda: shown), tmp_path)
    assert (shown.rows, shown.ended) == ([0], [])
    told = capsys.readouterr().err
    assert "failed at step 1 (No space left on device)" in told and told.count("\n") == 1
    assert f"python -m piper_hpc.jobs sync {tmp_path.name}" in told


def hangs(**settings: Any) -> None:
    Event().wait()


def exits(**settings: Any) -> None:
    sys.exit("wandb: no key")


def refuses(**settings: Any) -> None:
    raise ConnectionError("Failed to get resume status: connection refused")


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (hangs, "no answer within 0 s"),
        (exits, "SystemExit: wandb: no key"),
        (refuses, "Failed to get resume status: connection refused"),
    ],
    ids=["hangs", "exits", "refuses"],
)
def test_a_failing_init_of_wandb_ends_no_training(
    init: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb", reason="the optional extra wandb is not installed")
    monkeypatch.setattr("wandb.init", init)
    began_s = time.monotonic()
    train(GuardedTracker(lambda: make("wandb"), limit_s=0.2), tmp_path)
    assert time.monotonic() - began_s < LIMIT_S / 10
    assert f"the tracker did not start ({reason})" in capsys.readouterr().err


def test_without_a_key_or_a_network_wandb_itself_says_so_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real wandb.init, towards a port where nothing listens."""
    pytest.importorskip("wandb", reason="the optional extra wandb is not installed")
    monkeypatch.setattr("piper_hpc.tracking.wandb_run.LIMIT_S", 2.0)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    train(GuardedTracker(lambda: make("wandb"), limit_s=20.0), tmp_path)
    told = capsys.readouterr().err
    assert "the tracker did not start (" in told and "no answer within" not in told


def test_a_node_without_wandb_trains_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "piper_hpc.tracking.wandb_run", raising=False)
    train(GuardedTracker(lambda: make("wandb")), tmp_path)
    assert "pip install wandb" in capsys.readouterr().err


def test_an_end_that_hangs_is_left_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown()
    monkey: Any = shown
    monkey.finish = lambda status: Event().wait()
    train(GuardedTracker(lambda: shown, limit_s=0.2), tmp_path)
    assert "did not end well (no answer within 0 s)" in capsys.readouterr().err
