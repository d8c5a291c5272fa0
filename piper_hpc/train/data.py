"""A byte-level corpus read through a memory map, in an order that depends on the seed and the sample's index alone."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from piper_hpc.spec.layout import RankPlace

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


class Dataset(Protocol):
    """Tokens of each step for one rank."""

    def batch(self, first_sample: int) -> torch.Tensor:
        """int64 [sequences of this rank, sequence + 1] of the step that begins at global sample `first_sample`."""


@dataclass(frozen=True)
class Corpus:
    """Bytes of many files in one file on disk, and where it came from."""

    path: Path
    files: int
    size_bytes: int


def standard_library_files() -> list[Path]:
    """Python's own source files on this machine, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def find_files(pattern: str) -> list[Path]:
    """Files of a folder (all below it), of one path, or of a glob pattern, sorted.

    Raises FileNotFoundError naming the pattern where there are none.
    """
    root = Path(pattern).expanduser()
    found = root.rglob("*") if root.is_dir() else (Path(name) for name in glob.glob(str(root), recursive=True))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"data.path={pattern}: no file matches; give a folder, a file or a glob such as 'text/**/*.txt'"
        )
    return files


def prepare_corpus(files: Sequence[Path], cache: Path) -> Corpus:
    """Concatenate `files` into one file under `cache`, once: the name is a digest of paths, sizes and times.

    Safe with many ranks at once: each writes its own temporary file, and the last rename wins with equal bytes.
    """
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    target, index = cache / f"corpus-{digest}.bin", cache / f"corpus-{digest}.json"
    if not (target.exists() and index.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.uname().nodename}.{os.getpid()}")
        with partial.open("wb") as out:
            for path in files:
                out.write(path.read_bytes())
        os.replace(partial, target)
        partial.write_text(json.dumps({"schema_version": 1, "files": [[name, size] for name, size, _ in facts]}))
        os.replace(partial, index)
    return Corpus(target, len(files), target.stat().st_size)


class ByteDataset:
    """Windows of `sequence + 1` bytes; each epoch visits every window once in an order of its own.

    A step takes `global_batch` consecutive samples of that order, and a rank its equal share of them, so which samples
    a step sees depends on neither layout nor rank. Ranks of one pipeline get the same sequences.
    """

    def __init__(
        self, path: Path, *, sequence: int, global_batch: int, dense_dp: int, place: RankPlace, ep: int, seed: int
    ) -> None:
        """`dense_dp`: ranks that share a step's samples; raises ValueError where the file holds no whole window."""
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")
        self._sequence = sequence
        self._windows = (len(self._bytes) - 1) // sequence
        if self._windows < 1:
            raise ValueError(
                f"data of {len(self._bytes)} bytes holds no sequence of train.sequence={sequence} bytes and its next; "
                f"give more text or train.sequence={max(1, len(self._bytes) - 1)}"
            )
        self._share = global_batch // dense_dp
        self._offset = self._share * (place.replica * ep + place.shard)
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(self._windows)
        )

    def batch(self, first_sample: int) -> torch.Tensor:
        """int64 [global_batch / dense_dp, sequence + 1]; see `Dataset.batch`."""
        first = first_sample + self._offset
        windows = [self._window(sample) for sample in range(first, first + self._share)]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def _window(self, sample: int) -> np.ndarray:
        epoch, position = divmod(sample, self._windows)
        start = int(self._order(epoch)[position]) * self._sequence
        return self._bytes[start : start + self._sequence + 1]
