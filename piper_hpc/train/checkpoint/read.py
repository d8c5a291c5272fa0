"""Read a checkpoint into the parameters and moments of any layout: verified, whole, and without unpickling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.runs.checkpoints import CheckpointError, Sidecar, StoredFile, file_digest
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.problem import Problem
from piper_hpc.train.checkpoint.state import Part, Progress, held
from piper_hpc.train.optimizer import Optimizer


@dataclass(frozen=True)
class _Span:
    """Rows [start, stop) of a tensor that lie in one file."""

    file: StoredFile
    start: int
    stop: int


def load(
    path: Path,
    store: ParameterStore,
    optimizer: Optimizer,
    *,
    model: ModelSpec,
    seed: int,
    dtype: str,
    group: dist.ProcessGroup | None,
) -> Progress:
    """Read the checkpoint `path` into master weights and moments, whatever layout wrote it. Collective over `group`.

    Each rank checks the bytes of its share of the files, and reads the rows that it holds. Raises CheckpointError on
    all ranks, naming the file or the key, where a file is missing or altered, a row of a tensor is missing or there
    twice, or model, seed or type of the master weights are not this run's (dtype: what it computes in).
    """
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    sidecar: Sidecar | None = None
    problems: tuple[Problem, ...] = ()
    try:
        sidecar = Sidecar.of_whole(path)
        if differences := sidecar.origin.disagreements(model, seed=seed, dtype=dtype):
            raise CheckpointError(*differences)
        _verify(path, sidecar.files[rank::ranks])
        _read(path, sidecar, held(store, optimizer))
    except CheckpointError as error:
        problems = error.problems
    if told := _of_all_ranks(problems, group):
        raise CheckpointError(*told)
    assert sidecar is not None
    store.publish()
    optimizer.steps = sidecar.optimizer_steps
    return Progress(sidecar.step, sidecar.samples)


def spans(path: Path, sidecar: Sidecar) -> dict[str, list[_Span]]:
    """Where the rows of every tensor are, first row first. Raises CheckpointError unless each is there exactly once."""
    found: dict[str, list[_Span]] = {name: [] for name in sidecar.tensors}
    for file in sidecar.files:
        for name, (start, stop) in file.rows.items():
            if name not in found:
                raise CheckpointError.of(path, f"{file.name} has rows of {name}, of which no shape is known")
            found[name].append(_Span(file, start, stop))
    for name, parts in found.items():
        parts.sort(key=lambda span: span.start)
        edges = [0, *(edge for span in parts for edge in (span.start, span.stop)), sidecar.tensors[name][0]]
        for before, after in list(pairwise(edges))[::2]:
            if before != after:
                what = f"rows {before} to {after} are missing" if before < after else f"row {after} is there twice"
                files = ", ".join(span.file.name for span in parts) or "no file"
                raise CheckpointError.of(path, f"of {name} {what} (it is in {files})")
    return found


def _read(path: Path, sidecar: Sidecar, wanted: Sequence[Part]) -> None:
    """Copy the rows of `wanted` out of the files that hold them, one open at a time."""
    stored = spans(path, sidecar)
    by_file: dict[str, list[tuple[Part, _Span]]] = defaultdict(list)
    for part in wanted:
        shape = sidecar.tensors.get(part.name)
        if shape is None and not sidecar.optimizer_steps and part.name.startswith("optimizer."):
            part.values.zero_()  # nothing was learnt yet
            continue
        if shape is None:
            raise CheckpointError.of(path, f"{part.name} is in no file")
        if tuple(shape) != part.shape:
            raise CheckpointError.of(path, f"{part.name} has shape {list(shape)}, wanted is {list(part.shape)}")
        for span in stored[part.name]:
            if span.start < part.stop and part.start < span.stop:
                by_file[span.file.name].append((part, span))
    for name, rows in by_file.items():
        try:
            with safe_open(path / name, framework="pt") as file:
                for part, span in rows:
                    _copy(file.get_slice(part.name), part, span)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError.of(path, f"{name} cannot be read: {error}") from None


def _copy(stored: Any, part: Part, span: _Span) -> None:
    """Fill the rows of `part` that are in `span`; stored: the slice of the file that safetensors gives."""
    values = stored[max(part.start, span.start) - span.start : min(part.stop, span.stop) - span.start]
    shape = (span.stop - span.start, *part.shape[1:])
    # A narrower type loses nothing: weights that came from elsewhere have their own.
    if tuple(stored.get_shape()) != shape or torch.promote_types(values.dtype, part.values.dtype) != part.values.dtype:
        found = f"{values.dtype} {stored.get_shape()}"
        raise ValueError(f"{part.name} is {found}, wanted is {part.values.dtype} {list(shape)}")
    first = max(part.start, span.start) - part.start
    part.values[first : first + len(values)].copy_(values)


def _verify(path: Path, files: Sequence[StoredFile]) -> None:
    for file in files:
        try:
            digest = file_digest(path / file.name)
        except OSError as error:
            raise CheckpointError.of(path, f"{file.name} cannot be read ({error.strerror})") from None
        if digest != file.blake2b:
            raise CheckpointError.of(path, f"{file.name} is not as it was written: its blake2b differs")


def _of_all_ranks(problems: Sequence[Problem], group: dist.ProcessGroup | None) -> list[Problem]:
    """Each problem of any rank once, the same on all."""
    found = [list(problems)]
    if group is not None:
        found = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, list(problems), group=group)
    return list({str(problem): problem for of_rank in found for problem in of_rank}.values())
