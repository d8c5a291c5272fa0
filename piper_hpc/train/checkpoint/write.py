"""Write checkpoints while training goes on: a file for each rank, and the sidecar once all of them are on disk.

Only the copy to host memory holds training up. Ranks compare notes at the end of each step, in the thread that trains:
a collective of another thread would meet those of the step in another order on each rank.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.runs.checkpoints import CheckpointError, Origin, Sidecar, StoredFile, file_digest, new_folder, prune
from piper_hpc.runtime.failures import one_line_reason
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec.problem import Problem
from piper_hpc.train.checkpoint.state import Part, Progress, owned
from piper_hpc.train.optimizer import Optimizer

T = TypeVar("T")
_log = logging.getLogger(__name__)


ASSUMED_BYTES_PER_S = 20e6
"""Of one rank's file, before one was written: slow for a shared file system that all ranks write to at once."""
POLL_S = 0.05
"""How often ranks that wait for a checkpoint compare notes: the slowest file may take longer than a collective may."""


@dataclass(frozen=True)
class Written:
    """One rank's file, and the whole shapes of the tensors whose rows are in it."""

    file: StoredFile
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that ranks are writing; `written` is this rank's file."""

    path: Path
    progress: Progress
    optimizer_steps: int
    written: Future[Written]
    rank_of_expert: Sequence[Sequence[int]]


class Saver:
    """Writes the checkpoints of one attempt into `folder`, one at a time. Its methods are collective.

    every: steps between checkpoints, 0: none by count; keep, keep_every, inodes: which whole ones stay, see
    piper_hpc.runs.checkpoints.prune.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        store: ParameterStore,
        optimizer: Optimizer,
        *,
        saved: Progress,
        every: int,
        keep: int,
        keep_every: int = 0,
        inodes: int | None = None,
        group: dist.ProcessGroup | None,
        device: torch.device,
        rank_of_expert: Callable[[], Sequence[Sequence[int]]] = tuple,
    ) -> None:
        """saved: where training starts; group: all ranks, None for one alone; device: of its collectives;
        rank_of_expert: what the sidecar has of where experts are."""
        self._folder = folder
        self._origin = origin
        self._store = store
        self._optimizer = optimizer
        self._saved = saved
        self._every = every
        self._keep, self._pruned = keep, partial(prune, keep_every=keep_every, inodes=inodes)
        self._group = group
        self._device = device
        self._rank_of_expert = rank_of_expert
        self._rank = 0 if group is None else dist.get_rank(group)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        bytes_here = sum(part.values.numel() * part.values.element_size() for part in owned(store, optimizer))
        self._longest_s = bytes_here / ASSUMED_BYTES_PER_S
        self._begun_s, self._measured = 0.0, False
        self._flight: _Flight | None = None

    @property
    def expected_s(self) -> float:
        """How long a checkpoint takes: the longest that did so far, before the first what its bytes let expect."""
        return self._longest_s

    def after_step(self, reached: Progress, *, asked: bool = False) -> None:
        """Complete the checkpoint in flight if all ranks have written their files, and begin one where it is due.

        asked: it is due, whatever `every` says; the same on all ranks.
        reached: after the last step that was not skipped, so that what is due on a skipped one is saved after the
        next. Raises CheckpointError on all ranks where one of them could not write.
        """
        self._poll()
        if asked or (self._every and reached.step // self._every > self._saved.step // self._every):
            self.save(reached)

    def save(self, reached: Progress) -> None:
        """Copy the state to host memory and begin to write it, once the checkpoint before is whole.

        Does nothing where this was saved already. Raises what `after_step` raises.
        """
        self._finish()
        if reached.step <= self._saved.step:
            return
        self._begun_s = time.monotonic()
        path = self._on_first(lambda: new_folder(self._folder, reached.step))
        parts = [part.copied() for part in owned(self._store, self._optimizer)]
        written = self._thread.submit(write_file, path / file_name(self._rank), parts)
        self._flight = _Flight(path, reached, self._optimizer.steps, written, self._rank_of_expert())
        self._saved = reached

    def close(self) -> None:
        """Wait for all that is in flight. Raises what `after_step` raises."""
        self._finish()
        self._thread.shutdown()

    def _finish(self) -> None:
        while self._flight is not None:
            wait([self._flight.written], timeout=POLL_S)
            self._poll()

    def _poll(self) -> None:
        flight = self._flight
        if flight is None:
            return
        done = flight.written.done()
        error = flight.written.exception() if done else None
        (unfinished,) = self._sum(not done)
        if unfinished:
            return
        self._flight = None
        found = self._gather(one_line_reason(error) if error else flight.written.result())
        for rank, each in enumerate(found):
            if isinstance(each, str):
                rule = f"rank {rank} could not write {file_name(rank)}: {each}"
                works = "train.checkpoint_keep=1, or runs=FOLDER with room for checkpoints"
                self._on_first(lambda: shutil.rmtree(flight.path, ignore_errors=True))  # the ones before stay whole
                raise CheckpointError(Problem("train.checkpoint_every", str(flight.path), rule, works)) from error
        self._on_first(lambda: self._complete(flight, [each for each in found if isinstance(each, Written)]))
        took_s = time.monotonic() - self._begun_s
        self._longest_s = took_s if not self._measured else max(self._longest_s, took_s)
        self._measured = True

    def _complete(self, flight: _Flight, written: Sequence[Written]) -> None:
        Sidecar(
            step=flight.progress.step,
            samples=flight.progress.samples,
            optimizer_steps=flight.optimizer_steps,
            origin=self._origin,
            tensors={name: shape for each in written for name, shape in each.shapes.items()},
            files=tuple(each.file for each in written),
            rank_of_expert=flight.rank_of_expert,
        ).write(flight.path)
        self._thread.submit(self._prune, flight.path)

    def _prune(self, newest_whole: Path) -> None:
        try:
            self._pruned(self._folder, self._keep, newest_whole)
        except OSError as error:  # no reason to end a run
            _log.warning("an old checkpoint could not be removed: %s", error)

    def _sum(self, *mine: bool) -> list[int]:
        """How many ranks say yes, question by question."""
        votes = torch.tensor(mine, dtype=torch.int64, device=self._device)
        if self._group is not None:
            dist.all_reduce(votes, group=self._group)
        return [int(each) for each in votes.tolist()]

    def _gather(self, mine: Written | str) -> list[Written | str]:
        """What every rank has to say of its file, in rank order."""
        if self._group is None:
            return [mine]
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, mine, group=self._group)
        return found

    def _on_first(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on rank 0, on every rank."""
        return make() if self._group is None else broadcast_from_rank0(make)


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_file(path: Path, parts: Sequence[Part]) -> Written:
    """Write the parts, in host memory, as safetensors, and bring them to disk.

    Each tensor is named once, with its first row in the file's metadata as torch's HuggingFaceStorageReader expects
    it. Raises TypeError for what is no tensor, before anything is written.
    """
    for part in parts:
        if not isinstance(part.values, torch.Tensor):
            raise TypeError(f"{part.name} is a {type(part.values).__name__}: a checkpoint has tensors alone")
    offsets = {part.name: {"saved_offsets": [part.start] + [0] * (len(part.shape) - 1)} for part in parts}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
    save_file({part.name: part.values for part in parts}, path, metadata)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    rows = {part.name: (part.start, part.stop) for part in parts}
    stored = StoredFile(path.name, path.stat().st_size, file_digest(path), rows)
    return Written(stored, {part.name: part.shape for part in parts})
