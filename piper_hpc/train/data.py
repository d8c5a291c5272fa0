"""Samples of bytes or of tokens, read through memory maps in an order of the seed and the sample's index alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from piper_hpc.spec.layout import RankPlace
from piper_hpc.tokens.mixture import Mixture


class Dataset(Protocol):
    """Tokens of each step for one rank."""

    def batch(self, first_sample: int) -> torch.Tensor:
        """int64 [sequences of this rank, sequence + 1] of the step that begins at global sample `first_sample`.

        A token that is to be read and not to be learnt is given as -1 - id.
        """


def _samples_of(place: RankPlace, *, global_batch: int, dense_dp: int, ep: int) -> range:
    """Which samples of a step, counted from its first, a rank reads: an equal share, and one pipeline's ranks the same.

    dense_dp: ranks that share a step's samples.
    """
    share = global_batch // dense_dp
    return range(share * (place.replica * ep + place.shard), share * (place.replica * ep + place.shard + 1))


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
        self._samples = _samples_of(place, global_batch=global_batch, dense_dp=dense_dp, ep=ep)
        self._order = lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(self._windows)
        )

    def batch(self, first_sample: int) -> torch.Tensor:
        """int64 [global_batch / dense_dp, sequence + 1]; see `Dataset.batch`."""
        windows = [self._window(first_sample + sample) for sample in self._samples]
        return torch.from_numpy(np.stack(windows).astype(np.int64))

    def _window(self, sample: int) -> np.ndarray:
        epoch, position = divmod(sample, self._windows)
        start = int(self._order(epoch)[position]) * self._sequence
        return self._bytes[start : start + self._sequence + 1]


class TokenDataset:
    """Samples of a mixture of token streams: a step takes `global_batch` consecutive ones, and a rank its equal share,
    as with bytes."""

    def __init__(self, mixture: Mixture, *, global_batch: int, dense_dp: int, place: RankPlace, ep: int) -> None:
        """`dense_dp`: ranks that share a step's samples."""
        self._mixture = mixture
        self._samples = _samples_of(place, global_batch=global_batch, dense_dp=dense_dp, ep=ep)

    def batch(self, first_sample: int) -> torch.Tensor:
        """int64 [global_batch / dense_dp, sequence + 1]; see `Dataset.batch`."""
        return torch.from_numpy(np.stack([self._mixture.sample(first_sample + sample) for sample in self._samples]))
