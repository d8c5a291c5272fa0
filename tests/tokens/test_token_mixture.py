"""Samples of several sources: in an epoch no token twice, shares kept, documents' starts masked where asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.spec import SpecError
from piper_hpc.tokens.folder import TokenStream
from piper_hpc.tokens.mixture import Mixture
from tests.tokens.made import counted, made


@given(sequence=st.integers(2, 9), tokens=st.integers(10, 90), seed=st.integers(0, 5))
def test_in_an_epoch_no_token_is_an_input_or_a_target_twice(
    sequence: int, tokens: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mixture = Mixture(
        [TokenStream(counted(tmp_path_factory.mktemp("tokens"), tokens))], [1.0], sequence=sequence, seed=seed
    )
    (windows,) = mixture.windows
    assert windows == (tokens - 1) // sequence
    for epoch in range(2):
        samples = np.stack([mixture.sample(epoch * windows + position) for position in range(windows)])
        assert (np.diff(samples, axis=1) == 1).all(), "consecutive tokens of the stream, across shards"
        for read in (samples[:, :-1], samples[:, 1:]):
            assert len(np.unique(read)) == read.size == windows * sequence


def test_the_next_epoch_and_another_seed_have_another_order(tmp_path: Path) -> None:
    stream = TokenStream(counted(tmp_path, 200))
    orders = [[Mixture([stream], [1.0], sequence=4, seed=seed).place(n)[2] for n in range(98)] for seed in (0, 1)]
    assert orders[0][:49] != orders[0][49:] and orders[0] != orders[1]


def test_sources_keep_their_shares_and_epochs_of_their_own(tmp_path: Path) -> None:
    large, small = counted(tmp_path / "large", 401), counted(tmp_path / "small", 41, first=500)
    mixture = Mixture([TokenStream(large), TokenStream(small)], [0.7, 0.3], sequence=4, seed=0)
    places = [mixture.place(sample) for sample in range(100)]
    assert Counter(source for source, _, _ in places) == {0: 70, 1: 30}
    assert {epoch for source, epoch, _ in places if source == 0} == {0}
    of_small = Counter((epoch, window) for source, epoch, window in places if source == 1)
    assert set(of_small) == {(epoch, window) for epoch in range(3) for window in range(10)}
    assert set(of_small.values()) == {1}
    for sample, (source, _, window) in enumerate(places):
        assert mixture.sample(sample)[0] == 500 * source + 4 * window


def test_the_first_token_of_a_document_is_masked_where_it_is_a_target(tmp_path: Path) -> None:
    folder = made(tmp_path, [[[1, 2, 3], [4, 5]], [[6, 7, 8, 9]]])
    masked = Mixture([TokenStream(folder)], [1.0], sequence=4, seed=0, mask_document_starts=True)
    plain = Mixture([TokenStream(folder)], [1.0], sequence=4, seed=0)
    by_first = {int(masked.sample(sample)[0]): masked.sample(sample).tolist() for sample in range(2)}
    assert by_first == {1: [1, 2, 3, -5, 5], 5: [5, -7, 7, 8, 9]}
    assert {tuple(plain.sample(sample)) for sample in range(2)} == {(1, 2, 3, 4, 5), (5, 6, 7, 8, 9)}


def test_a_source_of_less_than_one_sample_is_refused_with_a_length_that_works(tmp_path: Path) -> None:
    stream = TokenStream(counted(tmp_path, 8))
    with pytest.raises(SpecError, match=r"train\.sequence = 8: .*has 8 tokens.*this works: train\.sequence=7"):
        Mixture([stream], [1.0], sequence=8, seed=0)
    assert Mixture([stream], [1.0], sequence=7, seed=0).windows == [1]
