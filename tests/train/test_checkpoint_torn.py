"""A save that is cut off never harms the checkpoint before; what is altered, missing or foreign is refused by name."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from piper_hpc.runs import checkpoints
from piper_hpc.runs.checkpoints import SIDECAR, CheckpointError, Sidecar, StoredFile, newest
from piper_hpc.train.checkpoint import Progress
from piper_hpc.train.checkpoint import read as reading
from piper_hpc.train.checkpoint import write as writing
from piper_hpc.train.checkpoint.state import Part
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks
from tests.train import layouts
from tests.train.layouts import LAYOUTS, MODEL, WORKLOAD

ONE = LAYOUTS["one"]
FILE = "rank-00000.safetensors"
KILLED = 9


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return layouts.trainer(ONE)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of step 2, written by this process alone."""
    folder = tmp_path_factory.mktemp("written")
    layouts.write(ONE, layouts.corpus(folder), folder / "checkpoints")
    return folder / "checkpoints" / "step-00000002"


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "checkpoints" / written.name))


def refused(trainer: Trainer, path: Path) -> str:
    """The message with which the checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        trainer.load(path, MODEL)
    return str(caught.value)


# Cut off ----------------------------------------------------------------------------------------------------------


def save_next(trainer: Trainer, folder: Path) -> None:
    """Save step 3 beside step 2, of which one alone is kept."""
    saver = trainer.saver(folder, layouts.origin(ONE), Progress(2, 24))
    saver._keep = 1
    saver.save(Progress(3, 36))
    saver.close()


def dying_at(stage: int) -> ExitStack:
    """Ends the process at the stage-th touch of the disk, before it happens, or within the write of the tensors."""
    left = [stage]

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(KILLED)
            return call(*arguments, **named)

        return touch

    def halves(tensors: Any, path: Path, metadata: Any) -> None:
        real(tensors, path, metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        counted(lambda: None)()
        path.write_bytes(content)

    real, patches = writing.save_file, ExitStack()
    patches.enter_context(patch.object(writing, "save_file", counted(halves)))
    for name in ("mkdir", "fsync", "replace", "unlink", "rmdir"):
        patches.enter_context(patch.object(os, name, counted(getattr(os, name))))
    return patches


def die_everywhere(written: Path, folder: Path) -> list[tuple[int, int]]:
    """Kill a save at each of its stages in turn; (newest step, loaded steps) after each, and after one that ends."""
    trainer, found = layouts.trainer(ONE), []
    for stage in range(1, 100):
        here = folder / str(stage)
        shutil.copytree(written, here / written.name)
        child = os.fork()
        if child == 0:
            with dying_at(stage):
                save_next(trainer, here)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, KILLED), code
        path = newest(here)
        assert path is not None
        found.append((int(path.name.removeprefix("step-")), trainer.load(path, MODEL).step))
        if code == 0:
            return found
    raise AssertionError("the save never ended")


@pytest.mark.processes
def test_a_save_killed_at_any_stage_leaves_a_whole_checkpoint(written: Path, tmp_path: Path) -> None:
    (found,) = run_ranks(1, die_everywhere, written, tmp_path)
    newest_steps = [step for step, _ in found]
    assert newest_steps == sorted(newest_steps) and set(newest_steps) == {2, 3}
    assert all(step == loaded for step, loaded in found)
    assert len(found) > 12  # a folder, a file, its bytes, the sidecar, and the removal of the old one


def fail_on_rank_1(source: Path, folder: Path) -> str:
    """What a rank raises when another's disk is full."""

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    layout = LAYOUTS["dp3_zero1"]
    rank = dist.get_rank()
    layouts.write(layout, source, folder)
    save_file = full if rank == 1 else writing.save_file
    with patch.object(writing, "save_file", save_file), pytest.raises(CheckpointError) as caught:
        layouts.losses(layout, 4, source, folder, folder / "step-00000002", every=1)
    return str(caught.value)


@pytest.mark.processes
def test_a_save_that_fails_on_one_rank_ends_all_and_spoils_nothing(tmp_path: Path) -> None:
    source, folder = layouts.corpus(tmp_path), tmp_path / "checkpoints"
    messages = run_ranks(3, fail_on_rank_1, source, folder)
    assert len(set(messages)) == 1
    assert "rank 1 could not write rank-00001.safetensors" in messages[0] and "No space left" in messages[0]
    assert newest(folder) == folder / "step-00000002"


def test_a_later_attempt_does_not_mix_its_files_with_what_an_earlier_left(trainer: Trainer, checkpoint: Path) -> None:
    folder = checkpoint.parent
    torn = folder / "step-00000003"
    torn.mkdir()
    (torn / "rank-00001.safetensors").write_bytes(b"of another attempt")
    save_next(trainer, folder)
    path = newest(folder)
    assert path == folder / "step-00000003.1" and trainer.load(path, MODEL) == Progress(3, 36)
    assert [each.name for each in folder.iterdir()] == [path.name]  # the torn and the old one are gone


# Altered ----------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_wherever_it_is(trainer: Trainer, checkpoint: Path) -> None:
    draw = random.Random(5)
    for name in (FILE, SIDECAR):
        whole = (checkpoint / name).read_bytes()
        for at in (0, 9, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(10))):
            spoiled = bytearray(whole)
            spoiled[at] ^= 1 << draw.randrange(8)
            (checkpoint / name).write_bytes(spoiled)
            assert name in refused(trainer, checkpoint), at
        (checkpoint / name).write_bytes(whole)
    assert trainer.load(checkpoint, MODEL).step == 2


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "were written"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
    ],
    ids=["gone", "short", "empty"],
)
def test_a_torn_newest_is_skipped_with_a_warning(
    spoil: Callable[[Path], None], words: str, trainer: Trainer, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn = checkpoint.parent / "step-00000010"
    shutil.copytree(checkpoint, torn)
    assert newest(checkpoint.parent) == torn
    spoil(torn / FILE)
    assert newest(checkpoint.parent) == checkpoint
    assert str(torn) in caplog.text and FILE in caplog.text and words in caplog.text
    assert FILE in refused(trainer, torn) and words in refused(trainer, torn)


def doctored(checkpoint: Path, change: Callable[[StoredFile], StoredFile]) -> None:
    """Write the sidecar again, whole in itself, with another account of the file."""
    sidecar = Sidecar.read(checkpoint)
    replace(sidecar, files=tuple(map(change, sidecar.files))).write(checkpoint)


NAME = "model.layers.0.attention.q.weight"
ROWS = MODEL.q_dim


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({NAME: (0, ROWS - 1)}, f"rows {ROWS - 1} to {ROWS} are missing"),
        ({NAME: (1, ROWS)}, "rows 0 to 1 are missing"),
        ({NAME: (0, ROWS + 1)}, f"row {ROWS} is there twice"),
        ({}, f"rows 0 to {ROWS} are missing"),
    ],
    ids=["last row", "first row", "too many", "all"],
)
def test_each_row_must_be_there_once(
    rows: dict[str, tuple[int, int]], words: str, trainer: Trainer, checkpoint: Path
) -> None:
    def change(file: StoredFile) -> StoredFile:
        return replace(file, rows={name: at for name, at in file.rows.items() if name != NAME} | rows)

    doctored(checkpoint, change)
    message = refused(trainer, checkpoint)
    assert f"of {NAME} {words}" in message


def test_a_tensor_of_another_shape_or_name_is_refused(trainer: Trainer, checkpoint: Path) -> None:
    sidecar = Sidecar.read(checkpoint)
    replace(sidecar, tensors=sidecar.tensors | {NAME: (ROWS, MODEL.hidden + 1)}).write(checkpoint)
    assert f"{NAME} has shape [{ROWS}, {MODEL.hidden + 1}]" in refused(trainer, checkpoint)
    tensors = {name: shape for name, shape in sidecar.tensors.items() if name != NAME}
    files = [replace(file, rows={name: at for name, at in file.rows.items() if name != NAME}) for file in sidecar.files]
    replace(sidecar, tensors=tensors, files=tuple(files)).write(checkpoint)
    assert f"{NAME} is in no file" in refused(trainer, checkpoint)
    replace(sidecar, tensors=tensors).write(checkpoint)
    assert f"{FILE} has rows of {NAME}, of which no shape is known" in refused(trainer, checkpoint)


# Foreign ----------------------------------------------------------------------------------------------------------


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def forbidden(*arguments: Any, **named: Any) -> None:
    raise AssertionError("something is unpickled")


@pytest.fixture
def no_unpickling() -> Iterator[None]:
    with ExitStack() as patches:
        for name in ("load", "loads", "Unpickler"):
            patches.enter_context(patch.object(pickle, name, forbidden))
        patches.enter_context(patch.object(torch, "load", forbidden))
        yield


def test_nothing_is_unpickled(trainer: Trainer, checkpoint: Path, tmp_path: Path, no_unpickling: None) -> None:
    mark = tmp_path / "unpickled"
    for name in (".metadata", "__0_0.distcp", "state.pt"):
        (checkpoint / name).write_bytes(pickle.dumps(Hostile(mark)))
    assert newest(checkpoint.parent) == checkpoint
    assert trainer.load(checkpoint, MODEL).step == 2
    (checkpoint / FILE).write_bytes((checkpoint / ".metadata").read_bytes())
    assert FILE in refused(trainer, checkpoint)
    assert not mark.exists()


def test_a_checkpoint_of_an_earlier_version_is_no_checkpoint(trainer: Trainer, tmp_path: Path) -> None:
    """It would have to be unpickled; and it is not removed either."""
    old = tmp_path / "step-00000002"
    old.mkdir()
    (old / ".metadata").write_bytes(b"a pickle")
    assert newest(tmp_path) is None
    assert f"{SIDECAR} is missing" in refused(trainer, old)
    save_next(trainer, tmp_path)
    assert (old / ".metadata").exists()


def test_only_tensors_go_in(tmp_path: Path) -> None:
    """torch's own writer takes another entry without a word, and leaves a file that cannot be read."""
    parts = [Part("model.a", (2,), 0, 2, torch.ones(2)), Part("progress", (1,), 0, 1, {"step": 3})]  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="progress is a dict"):
        writing.write_file(tmp_path / FILE, parts)
    assert not list(tmp_path.iterdir())


# Of another run ---------------------------------------------------------------------------------------------------


def test_another_seed_model_or_type_is_refused_by_key(trainer: Trainer, checkpoint: Path) -> None:
    sidecar = Sidecar.read(checkpoint)
    origin = replace(
        sidecar.origin, seed=7, dtype="float64", model=sidecar.origin.model | {"top_k": 1, "name": "other"}
    )
    replace(sidecar, origin=origin).write(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        trainer.load(checkpoint, MODEL)
    told = {problem.key: (problem.value, problem.works) for problem in caught.value.problems}
    assert told == {
        "train.seed": (layouts.SEED, "train.seed=7"),
        "train.dtype": ("float32", "train.dtype=float64"),
        "model.top_k": (MODEL.top_k, "model.top_k=1"),
    }
    assert all("must be" in problem.rule for problem in caught.value.problems)


def test_a_sidecar_of_another_schema_is_refused(trainer: Trainer, checkpoint: Path) -> None:
    sidecar = Sidecar.read(checkpoint)
    with patch.object(checkpoints, "SCHEMA_VERSION", 2):
        sidecar.write(checkpoint)
    assert "schema_version 2, read here is 1" in refused(trainer, checkpoint)


def test_steps_that_were_skipped_are_no_updates(trainer: Trainer, checkpoint: Path) -> None:
    replace(Sidecar.read(checkpoint), optimizer_steps=1).write(checkpoint)
    assert trainer.load(checkpoint, MODEL) == Progress(2, 2 * WORKLOAD.global_batch)
    assert trainer.optimizer.steps == 1


def test_a_file_that_the_disk_does_not_give_is_named(trainer: Trainer, checkpoint: Path) -> None:
    with patch.object(reading, "file_digest", side_effect=OSError(errno.EIO, os.strerror(errno.EIO))):
        assert f"{FILE} cannot be read (Input/output error)" in refused(trainer, checkpoint)
