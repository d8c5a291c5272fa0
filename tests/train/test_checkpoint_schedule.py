"""When a run saves: beside training, one at a time, after progress alone, at the end, and when it is asked to stop."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.runs.checkpoints import CheckpointError, Sidecar
from piper_hpc.runtime.failures import classify
from piper_hpc.train.checkpoint import write as writing
from piper_hpc.train.loop import train
from piper_hpc.train.vote import NonFiniteError
from tests.processes import run_ranks
from tests.train import layouts
from tests.train.layouts import CPU, LAYOUTS, MODEL, WORKLOAD

ONE, TWO = LAYOUTS["one"], layouts.Layout(ep=2, micro_batch=2)
PATIENCE_S = 30.0


def run(layout: layouts.Layout, source: Path, folder: Path | None, steps: int, **given: Any) -> int:
    """Train; `given` are settings, and of `train` on_step and stop_asked."""
    calls = {name: given.pop(name) for name in ("on_step", "stop_asked") if name in given}
    return train(
        MODEL, layout, WORKLOAD, layouts.settings(steps, **given), rank_map=layouts.rank_map(layout), device=CPU,
        data=layouts.data(layout, source), checkpoint_dir=folder, **calls,
    )  # fmt: skip


def steps_saved(folder: Path) -> dict[int, Sidecar]:
    """Whole checkpoints by step."""
    found = [Sidecar.of_whole(path) for path in sorted(folder.glob("step-*"))]
    return {sidecar.step: sidecar for sidecar in found}


def test_training_goes_on_while_a_thread_writes_what_was(tmp_path: Path) -> None:
    source = layouts.corpus(tmp_path)
    run(ONE, source, tmp_path / "undisturbed", 4, checkpoint_every=2)
    trained, held_up, real = threading.Event(), [], writing.write_file

    def late(path: Path, parts: Any) -> Any:
        if "step-00000002" in str(path):
            held_up.append(not trained.wait(PATIENCE_S))
        return real(path, parts)

    with patch.object(writing, "write_file", late):
        run(
            ONE, source, tmp_path / "late", 4, checkpoint_every=2,
            on_step=lambda row: trained.set() if row["step"] == 2 else None,
        )  # fmt: skip
    assert held_up == [False]  # step 2 was trained before the state of step 1 was written
    undisturbed, late_ones = steps_saved(tmp_path / "undisturbed"), steps_saved(tmp_path / "late")
    assert late_ones.keys() == {2, 4}
    assert [late_ones[step].files for step in (2, 4)] == [undisturbed[step].files for step in (2, 4)]


def test_one_save_is_in_flight_at_most(tmp_path: Path) -> None:
    events, real = [], writing.write_file

    def slow(path: Path, parts: Any) -> Any:
        events.append(("begins", path.parent.name))
        threading.Event().wait(0.2)
        written = real(path, parts)
        events.append(("ends", path.parent.name))
        return written

    with patch.object(writing, "write_file", slow):
        run(ONE, layouts.corpus(tmp_path), tmp_path / "checkpoints", 3, checkpoint_every=1, checkpoint_keep=0)
    assert [name for what, name in events if what == "begins"] == [f"step-0000000{step}" for step in (1, 2, 3)]
    assert events[::2] == [("begins", name) for _, name in events[1::2]]
    assert steps_saved(tmp_path / "checkpoints").keys() == {1, 2, 3}


@pytest.mark.parametrize(
    ("chosen", "saved"),
    [
        ({"checkpoint_every": 1}, {4, 5}),
        ({"checkpoint_every": 1, "checkpoint_keep": 1}, {5}),
        ({"checkpoint_every": 2, "checkpoint_keep": 0}, {2, 4, 5}),
        ({}, {5}),
    ],
    ids=["two are kept", "one", "all", "the last alone"],
)
def test_the_newest_are_kept(chosen: dict[str, int], saved: set[int], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert run(ONE, layouts.corpus(tmp_path), folder, 5, **chosen) == 5
    assert steps_saved(folder).keys() == saved
    assert all(each.samples == step * WORKLOAD.global_batch for step, each in steps_saved(folder).items())


def broken_at(step: int) -> Callable[..., None]:
    """`ParameterStore.start_reduction` with an infinity among this rank's gradients of one step."""
    real, calls = ParameterStore.start_reduction, [0]

    def start_reduction(store: ParameterStore, chunk: int) -> None:
        if calls[0] == step:
            store.buckets[0].gradients[0] = torch.inf
        calls[0] += 1
        real(store, chunk)

    return start_reduction


def run_with_an_infinity(source: Path, folder: Path, on_non_finite: str) -> tuple[str, list[dict[str, Any]]]:
    """Five steps with an infinite gradient on rank 1 in the third: what ended them, and the rows."""
    rows: list[dict[str, Any]] = []
    patched = broken_at(2) if dist.get_rank() == 1 else ParameterStore.start_reduction
    with patch.object(ParameterStore, "start_reduction", patched):
        try:
            run(
                TWO, source, folder, 5, checkpoint_every=1, checkpoint_keep=0, on_non_finite=on_non_finite,
                on_step=rows.append,
            )  # fmt: skip
        except NonFiniteError as error:
            return str(error), rows
    return "finished", rows


@pytest.mark.processes
def test_a_gradient_that_is_not_finite_stops_all_ranks_and_nothing_is_saved(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (ended, rows), (other, _) = run_ranks(2, run_with_an_infinity, layouts.corpus(tmp_path), folder, "stop")
    assert ended == other and ended.startswith("step 2: the gradient is not finite of ")
    assert "embedding.weight on rank 0, 1" in ended
    assert [row["step"] for row in rows] == [0, 1]
    assert steps_saved(folder).keys() == {1, 2}


@pytest.mark.processes
def test_a_step_that_is_skipped_is_told_and_is_no_progress(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (ended, rows), (other, _) = run_ranks(2, run_with_an_infinity, layouts.corpus(tmp_path), folder, "skip")
    assert ended == other == "finished"
    assert [row["step"] for row in rows] == list(range(5))
    assert [row.get("skipped", "")[:38] for row in rows] == ["", "", "step 2: the gradient is not finite of ", "", ""]
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows)
    saved = steps_saved(folder)
    assert {step: each.optimizer_steps for step, each in saved.items()} == {1: 1, 2: 2, 4: 3, 5: 4}
    assert [each.samples for each in saved.values()] == [12, 24, 48, 60]


def test_time_asks_for_checkpoints_too(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(ONE, layouts.corpus(tmp_path), folder, 3, checkpoint_every_s=1e-6, checkpoint_keep=0)
    assert steps_saved(folder).keys() == {1, 2, 3}


def test_a_step_and_a_checkpoint_are_known_before_they_are_asked_for(tmp_path: Path) -> None:
    needed: list[float] = []

    def asked(needed_s: float) -> bool:
        needed.append(needed_s)
        return False

    run(ONE, layouts.corpus(tmp_path), tmp_path / "checkpoints", 5, checkpoint_every=2, stop_asked=asked)
    assert needed[0] > 0, "of the first checkpoint its bytes are known"
    assert all(later > 0 for later in needed)


def run_with_a_full_disk(source: Path, folder: Path) -> str:
    """Rank 1 has no room for its second file."""
    real = writing.write_file

    def full(path: Path, parts: Any) -> Any:
        if "step-00000004" in str(path) and dist.get_rank() == 1:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, parts)

    with patch.object(writing, "write_file", full):
        try:
            run(TWO, source, folder, 6, checkpoint_every=2)
        except CheckpointError as error:
            return classify(error)
    return "finished"


@pytest.mark.processes
def test_a_full_disk_ends_training_by_its_class_and_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert run_ranks(2, run_with_a_full_disk, layouts.corpus(tmp_path), folder) == ["disk_full"] * 2
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert steps_saved(folder).keys() == {2}


def run_until_asked(source: Path, folder: Path) -> int:
    """Rank 1 asks before its third step."""
    asked = iter([False, False, True])
    return run(TWO, source, folder, 100, stop_asked=lambda needed_s: dist.get_rank() == 1 and next(asked))


@pytest.mark.processes
def test_all_ranks_stop_with_a_checkpoint_when_one_asks(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert run_ranks(2, run_until_asked, layouts.corpus(tmp_path), folder) == [3, 3]
    assert steps_saved(folder).keys() == {3}
