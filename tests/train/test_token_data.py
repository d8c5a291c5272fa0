"""Training on tokens: every layout the same samples, none twice, and a run goes on at the exact sample in another."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.parallel.pipeline import TokenLoss
from piper_hpc.profiling.clock import clock_for
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Layout, RankMap, SpecError
from piper_hpc.tokens.folder import TokenStream
from piper_hpc.tokens.mixture import Mixture
from piper_hpc.train.data import TokenDataset
from piper_hpc.train.loop import train
from piper_hpc.train.tokens import open_on_all_ranks
from tests.processes import run_ranks
from tests.tokens.made import counted, made
from tests.train import layouts
from tests.train.layouts import CPU, LAYOUTS, MODEL, WORKLOAD

SEQUENCE = WORKLOAD.sequence


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources with ids below MODEL.vocab, in shards, the second soon read through."""
    root = tmp_path_factory.mktemp("tokens")
    documents = [[[(7 * each + at) % 63 for at in range(5 + each % 9)] for each in range(40)] for _ in range(2)]
    return [made(root / "large", documents), counted(root / "small", 50)]


def mixture(folders: list[Path], *, mask: bool = False) -> Mixture:
    streams = [TokenStream(folder) for folder in folders]
    return Mixture(streams, [0.75, 0.25], sequence=SEQUENCE, seed=layouts.SEED, mask_document_starts=mask)


def data(folders: list[Path], layout: Layout, rank: int, *, mask: bool = False) -> TokenDataset:
    return TokenDataset(
        mixture(folders, mask=mask),
        global_batch=WORKLOAD.global_batch,
        dense_dp=layout.dense_dp,
        place=RankMap.block(layout, layout.ranks, (0,)).places[rank],
        ep=layout.ep,
    )


def step_of(folders: list[Path], layout: Layout, first_sample: int) -> list[list[int]]:
    """All sequences of a step, from the ranks of the first pipeline rank in their order."""
    parts = [data(folders, layout, rank).batch(first_sample) for rank in range(layout.dense_dp)]
    return torch.cat(parts).tolist()


@given(layout=st.sampled_from(list(LAYOUTS.values())), step=st.integers(0, 10**6))
def test_a_step_has_the_same_samples_in_every_layout(folders: list[Path], layout: Layout, step: int) -> None:
    first = step * WORKLOAD.global_batch
    assert step_of(folders, layout, first) == [mixture(folders).sample(first + n).tolist() for n in range(12)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_that_share_a_batch_read_none_twice_and_those_of_a_pipeline_the_same(
    folders: list[Path], layout: Layout
) -> None:
    read = [data(folders, layout, rank)._samples for rank in range(layout.ranks)]
    places = RankMap.block(layout, layout.ranks, (0,)).places
    by_share: dict[tuple[int, int], set[range]] = {}
    for place, samples in zip(places, read, strict=True):
        by_share.setdefault((place.replica, place.shard), set()).add(samples)
    assert all(len(of_pipeline) == 1 for of_pipeline in by_share.values())
    every = [sample for (samples,) in by_share.values() for sample in samples]
    assert sorted(every) == list(range(WORKLOAD.global_batch))


class Noted:
    """A dataset that notes what was asked of it, and what it gave."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset, self.given = dataset, dict[int, list[list[int]]]()

    def batch(self, first_sample: int) -> torch.Tensor:
        tokens = self.dataset.batch(first_sample)
        self.given[first_sample] = tokens.tolist()
        return tokens


def losses(
    layout: Layout, steps: int, folders: list[Path], save: Path | None, resume_from: Path | None
) -> tuple[dict[int, float], dict[int, list[list[int]]]]:
    """Loss by step on rank 0, and what this rank read."""
    noted, found = Noted(data(folders, layout, dist.get_rank() if dist.is_initialized() else 0)), dict[int, float]()
    train(
        MODEL,
        layout,
        WORKLOAD,
        layouts.settings(steps),
        rank_map=layouts.rank_map(layout),
        device=CPU,
        data=noted,
        checkpoint_dir=save,
        resume_from=resume_from,
        on_step=lambda row: found.__setitem__(row["step"], row["loss"]),
    )
    return found, noted.given


@pytest.mark.processes
def test_a_run_goes_on_at_the_exact_sample_in_another_layout(folders: list[Path], tmp_path: Path) -> None:
    """One rank trains two steps; pipelines with experts spread, and replicas, train the two after them."""
    ((whole, read),) = run_ranks(1, losses, LAYOUTS["one"], 4, folders, None, None)
    run_ranks(1, losses, LAYOUTS["one"], 2, folders, tmp_path, None)
    for name in ("pp2_ep2", "ep2_dp2_zero1"):
        layout = LAYOUTS[name]
        ranks = run_ranks(layout.ranks, losses, layout, 4, folders, None, tmp_path / "step-00000002")
        assert ranks[0][0] == pytest.approx({step: whole[step] for step in (2, 3)}, rel=1e-5)
        for first in (2 * WORKLOAD.global_batch, 3 * WORKLOAD.global_batch):
            assert [row for _, given in ranks[: layout.dense_dp] for row in given[first]] == read[first]
        assert set(ranks[0][1]) == {2 * WORKLOAD.global_batch, 3 * WORKLOAD.global_batch}


def test_a_masked_target_adds_nothing_and_counts_as_a_token() -> None:
    logits = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss_of = TokenLoss(6, Recorder(clock_for(CPU)), CPU)
    targets = torch.tensor([[1, -1, 3], [4, 5, -1]])
    loss = loss_of._loss(logits, targets)
    kept = targets.flatten() >= 0
    expected = F.cross_entropy(logits.flatten(0, 1)[kept], targets.flatten()[kept], reduction="sum") / 6
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert logits.grad is not None and (logits.grad.flatten(0, 1)[~kept] == 0).all()
    assert (logits.grad.flatten(0, 1)[kept] != 0).all()


def test_a_masked_token_is_read_as_it_is_and_not_learnt(folders: list[Path]) -> None:
    layout = LAYOUTS["one"]
    trainer = layouts.trainer(layout)
    plain, masked = (data(folders, layout, 0, mask=mask).batch(0) for mask in (False, True))
    hidden = masked < 0
    assert hidden.any() and not hidden[:, 0].any() and torch.equal(torch.where(hidden, -1 - masked, masked), plain)
    with patch.object(trainer.pipeline, "_accumulate") as accumulate:
        trainer.pipeline.step(masked)
    inputs, targets = accumulate.call_args.args
    assert torch.equal(inputs, plain[:, :-1])
    assert torch.equal(targets, torch.where(hidden, -1, plain)[:, 1:])


def opened(folders: list[Path]) -> str:
    try:
        return str([len(stream) for stream in open_on_all_ranks([folders[dist.get_rank()]], f"n{dist.get_rank()}")])
    except SpecError as error:
        return str(error)


@pytest.mark.processes
def test_all_ranks_end_with_one_error_where_one_reads_other_tokens(folders: list[Path], tmp_path: Path) -> None:
    assert run_ranks(2, opened, [folders[1], folders[1]]) == ["[50]", "[50]"]
    first, second = run_ranks(2, opened, [folders[1], folders[0]])
    assert first.split("'")[2:] == second.split("'")[2:] and "rank 1 on n1 would read other tokens" in first
    for said in run_ranks(2, opened, [folders[1], tmp_path / "nothing"]):
        assert "on n1: has no index.json" in said and "data.path = " in said
