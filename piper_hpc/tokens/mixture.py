"""Samples of several token streams, mixed by weight, in an order that is a function of seed and sample index alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from piper_hpc.spec.problem import Problem, SpecError
from piper_hpc.tokens.folder import TokenStream
from piper_hpc.tokens.order import Mix, Permutation


class Mixture:
    """Windows of `sequence + 1` tokens of packed documents, each source in a shuffled order, mixed by weight.

    A window begins at a multiple of `sequence` of its source's stream, so that in an epoch of a source no token is an
    input, or a target, twice; a window's last target is the first input of the one behind it. Epochs are a source's
    own: one that is small for its weight begins its next, in another order, while others are in their first.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        *,
        sequence: int,
        seed: int,
        mask_document_starts: bool = False,
    ) -> None:
        """mask_document_starts: see `sample`. Raises SpecError where a source has no whole window."""
        self.windows = [(len(stream) - 1) // sequence for stream in streams]
        for stream, windows in zip(streams, self.windows, strict=True):
            if windows < 1:
                raise SpecError(too_short(stream.folder, len(stream), sequence))
        self._streams, self._mix, self._sequence = streams, Mix(weights), sequence
        self._mask = mask_document_starts
        self._order = lru_cache(maxsize=2 * len(streams))(
            lambda source, epoch: Permutation(self.windows[source], (seed, source, epoch))
        )

    def place(self, sample: int) -> tuple[int, int, int]:
        """(source, epoch of it, window) of global sample `sample`."""
        source, number = self._mix[sample]
        epoch, position = divmod(number, self.windows[source])
        return source, epoch, self._order(source, epoch)[position]

    def sample(self, sample: int) -> np.ndarray:
        """int64 [sequence + 1]: the tokens of global sample `sample`.

        With mask_document_starts, the first token of a document is given as -1 - id wherever it would be predicted from
        the document before: it is read, and not learnt.
        """
        source, _, window = self.place(sample)
        start = window * self._sequence
        stop = start + self._sequence + 1
        tokens = self._streams[source].read(start, stop)
        if self._mask:
            firsts = self._streams[source].first_tokens(start, stop) - start
            tokens[firsts] = -1 - tokens[firsts]
        return tokens


def too_short(folder: Path, tokens: int, sequence: int) -> Problem:
    """What is wrong with a source of fewer tokens than one sequence and its next."""
    rule = f"{folder} has {tokens} tokens, and a sample is a sequence and the token behind it"
    return Problem("train.sequence", sequence, rule, f"train.sequence={max(2, tokens - 1)}")
