"""The order of samples: a function of seed and global sample index, whatever the layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from piper_hpc.spec import Layout, RankMap
from piper_hpc.train.data import ByteDataset

SEQUENCE, GLOBAL_BATCH = 4, 8
WINDOWS = 20


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "bytes.bin"
    np.arange(SEQUENCE * WINDOWS + 1, dtype=np.uint8).tofile(path)
    return path


def read(path: Path, layout: Layout, rank: int, first_sample: int, seed: int = 0) -> torch.Tensor:
    place = RankMap.block(layout, layout.ranks, (0,)).places[rank]
    data = ByteDataset(
        path,
        sequence=SEQUENCE,
        global_batch=GLOBAL_BATCH,
        dense_dp=layout.dense_dp,
        place=place,
        ep=layout.ep,
        seed=seed,
    )
    return data.batch(first_sample)


def samples(path: Path, layout: Layout, first_sample: int) -> list[list[int]]:
    """All sequences of a step, from the ranks of the first stage in rank order."""
    parts = [read(path, layout, rank, first_sample) for rank in range(layout.dense_dp)]
    return torch.cat(parts).tolist()


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(pp=2, ep=2, dp=2), Layout(ep=4, dp=2)], ids=Layout.name)
def test_a_step_has_the_same_samples_in_every_layout(layout: Layout, corpus: Path) -> None:
    for first_sample in (0, GLOBAL_BATCH, 5 * GLOBAL_BATCH):
        assert samples(corpus, layout, first_sample) == samples(corpus, Layout(), first_sample)


def test_ranks_of_one_pipeline_read_the_same_sequences(corpus: Path) -> None:
    layout = Layout(pp=2, ep=2)
    for shard in range(2):
        assert torch.equal(read(corpus, layout, shard, 0), read(corpus, layout, 2 + shard, 0))


def test_an_epoch_visits_every_window_once_and_the_next_in_another_order(corpus: Path) -> None:
    whole = torch.cat([read(corpus, Layout(), 0, first) for first in range(0, 2 * WINDOWS, GLOBAL_BATCH)])
    starts = whole[:, 0].tolist()
    every = [window * SEQUENCE for window in range(WINDOWS)]
    assert sorted(starts[:WINDOWS]) == every and sorted(starts[WINDOWS:]) == every
    assert starts[:WINDOWS] != starts[WINDOWS:]
    assert all(row == list(range(row[0], row[0] + SEQUENCE + 1)) for row in whole.tolist())


def test_seed_changes_the_order(corpus: Path) -> None:
    assert not torch.equal(read(corpus, Layout(), 0, 0, seed=0), read(corpus, Layout(), 0, 0, seed=1))


def test_too_little_text_is_refused_with_a_length_that_works(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(b"abcd")
    with pytest.raises(ValueError, match=r"train\.sequence=4.*train\.sequence=3"):
        read(path, Layout(), 0, 0)
