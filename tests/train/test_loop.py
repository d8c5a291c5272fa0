"""The whole loop on four real processes: what a run records, that it learns, and how it ends when a rank fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from piper_hpc.profiling.memory import LiveBytes
from piper_hpc.profiling.offset import ClockOffset
from piper_hpc.profiling.spans import Span
from piper_hpc.spec import TERMS, Layout, ModelSpec, RankMap, Workload
from piper_hpc.train import trainer as trainer_code
from piper_hpc.train.corpus import prepare_corpus, standard_library_files
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.loop import train
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.full import full
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=2, hidden=64, heads=2, kv_heads=1, head_dim=32, experts=4, top_k=2, expert_ffn=64, vocab=256
)
LAYOUT = Layout(pp=2, ep=2, micro_batch=2)
WORKLOAD = Workload(global_batch=8, sequence=64)
TIMEOUT_S = 4.0
CLOCK_RESOLUTION_S = 1e-6
"""What rounding may leave of times near the monotonic clock's value, some thousand seconds."""


class FailingData:
    """Tokens until the third step, then an error on one rank."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def batch(self, first_sample: int) -> torch.Tensor:
        if self.fails and first_sample >= 2 * WORKLOAD.global_batch:
            raise OSError("the disk is gone")
        return torch.zeros(4, WORKLOAD.sequence + 1, dtype=torch.int64)


class RepeatedData:
    """The same eight sequences of one repeated byte each."""

    def batch(self, first_sample: int) -> torch.Tensor:
        return torch.arange(8)[:, None].expand(8, WORKLOAD.sequence + 1)


def run(cache: Path, steps: int, timing: bool = True) -> tuple[list[dict[str, Any]], list[Span], int]:
    """Rows of metrics (on rank 0), the spans of the last step, and bytes of tensors that this rank held before."""
    with LiveBytes() as others:
        pass
    rank_map = RankMap.block(LAYOUT, 4, (0,))
    data = ByteDataset(
        prepare_corpus(standard_library_files(), cache).path,
        sequence=WORKLOAD.sequence,
        global_batch=WORKLOAD.global_batch,
        dense_dp=LAYOUT.dense_dp,
        place=rank_map.places[dist.get_rank()],
        ep=LAYOUT.ep,
        seed=0,
    )
    rows: list[dict[str, Any]] = []
    spans: dict[int, Any] = {}
    settings = TrainSettings(
        steps=steps, learning_rate=1e-2, warmup_steps=3, flops_per_token=1e6, peak_flops=1e9, collective_timeout_s=30.0,
        timing=timing,
    )  # fmt: skip
    train(
        MODEL, LAYOUT, WORKLOAD, settings, rank_map=rank_map, device=torch.device("cpu"), data=data,
        on_step=rows.append, on_spans=spans.__setitem__,
    )  # fmt: skip
    return rows, spans[steps - 1], others.live_bytes


def run_until_failure(failing_rank: int) -> tuple[str, float]:
    """What ended training on this rank, and after how many seconds."""
    settings = TrainSettings(steps=100, collective_timeout_s=TIMEOUT_S)
    started = time.monotonic()
    try:
        train(
            MODEL, LAYOUT, WORKLOAD, settings, rank_map=RankMap.block(LAYOUT, 4, (0,)), device=torch.device("cpu"),
            data=FailingData(dist.get_rank() == failing_rank),
        )  # fmt: skip
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return "finished", time.monotonic() - started


@pytest.mark.processes
def test_loss_falls_and_every_row_is_whole(tmp_path: Path) -> None:
    ranks = run_ranks(4, run, tmp_path, 30)
    rows = ranks[0][0]
    assert [row["step"] for row in rows] == list(range(30))
    assert [row["warmup"] for row in rows] == [True, True] + [False] * 28
    assert rows[0]["loss"] == pytest.approx(5.55, abs=0.1) and rows[-1]["loss"] < 4.0
    assert all(not others for others, *_ in ranks[1:])
    for row in rows:
        assert sum(row[term] for term in TERMS) == pytest.approx(row["step_time_s"])
        assert min(row[term] for term in TERMS) >= -CLOCK_RESOLUTION_S
        assert row["other_s"] >= row["other_self_s"] - CLOCK_RESOLUTION_S, "spans nest: no second counts twice"
        assert row["other_self_s"] > 0.0
        assert row["wall_s"] > row["step_time_s"]
        assert row["wall_tokens_per_s"] == pytest.approx(WORKLOAD.tokens / row["wall_s"])
        assert row["wall_mfu"] == pytest.approx(row["mfu"] * row["step_time_s"] / row["wall_s"])
        assert row["tokens"] == WORKLOAD.tokens and row["critical_stage"] in (0, 1)
        assert len(row["expert_load"]) == MODEL.layers and all(1.0 <= load <= 2.0 for load in row["expert_load"])
        assert row["flops_per_rank_per_s"] == pytest.approx(row["tokens_per_s"] * 1e6 / 4)
        assert row["mfu"] == pytest.approx(row["flops_per_rank_per_s"] / 1e9)
    training_state = 16 * MODEL.parameters  # weights, gradients and two moments in float32
    peaks = [peak - before for peak, (*_, before) in zip(rows[-1]["peak_memory_bytes"], ranks, strict=True)]
    assert all(0.25 < peak / training_state < 3 for peak in peaks), [before for *_, before in ranks]
    assert all(rss > 50e6 for rss in rows[-1]["rss_bytes"])


@pytest.mark.processes
def test_training_that_is_not_timed_learns_the_same(tmp_path: Path) -> None:
    (timed, *_), *_ = run_ranks(4, run, tmp_path, 4)
    (untimed, spans, _), *_ = run_ranks(4, run, tmp_path, 4, False)
    for key in ("loss", "aux_loss", "grad_norm", "expert_load"):
        for row, other in zip(untimed, timed, strict=True):
            assert row[key] == pytest.approx(other[key], rel=1e-5)
    assert [span.name for span in spans] == ["other"]
    assert all(0 < row["step_time_s"] < row["wall_s"] and row["mfu"] > 0 for row in untimed)
    assert not any(term in row for row in untimed for term in (*TERMS, "stages"))


def run_with_drift(due_on: int) -> tuple[int, list[float]]:
    """How often this rank compared clocks in three steps, of which only rank `due_on` finds them due; and by how much
    each record says that the clock of rank 1, which is on another host and gains 1 s between steps, is wrong."""
    layout, rank = Layout(ep=2, micro_batch=4), dist.get_rank()
    comparisons: list[ClockOffset] = []

    def compare(device: torch.device) -> ClockOffset:
        dist.barrier()  # collective: a rank that came alone would wait for ever
        comparisons.append(ClockOffset(time.monotonic(), -float(rank * len(comparisons))))
        return comparisons[-1]

    trainer = Trainer(
        MODEL, layout, WORKLOAD, TrainSettings(steps=3, collective_timeout_s=10.0),
        rank_map=RankMap.block(layout, 2, (0,)), device=torch.device("cpu"),
    )  # fmt: skip
    starts: list[float] = []
    with (
        patch.object(trainer_code, "compare_with_rank_0", compare),
        patch.object(trainer_code, "CLOCK_REFRESH_S", -1.0 if rank == due_on else 1e9),
    ):
        for step in range(3):
            trainer.step(RepeatedData(), step, 1e-3, sample_memory=False)
            here_s, records = trainer.spans[0].start_s, trainer.record()
            moved = trainer.aligned_spans()[0].start_s - here_s
            starts.append(moved)
            if records is not None:
                assert records.ranks["start_s"][0] == pytest.approx(here_s)
    return len(comparisons), starts


@pytest.mark.processes
@pytest.mark.parametrize("due_on", [0, 1])
def test_all_ranks_compare_clocks_when_it_is_time_on_one(due_on: int) -> None:
    (first, still), (second, moved) = run_ranks(2, run_with_drift, due_on)
    assert first == second == 3 and still == [0.0] * 3
    # The drift goes on after a comparison, so that the middle of a step is further off than its comparison said.
    assert moved[0] == 0.0 and moved[1] < -1.0 and moved[2] < -2.0


def run_in_bfloat16() -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """Losses of a few steps on constant tokens (on rank 0), the types of weights, and of gradients and masters."""
    layout = Layout(pp=2, micro_batch=4)
    settings = TrainSettings(steps=6, learning_rate=1e-2, warmup_steps=0, dtype="bfloat16", collective_timeout_s=30.0)
    rank_map, losses = RankMap.block(layout, 2, (0,)), []
    trainer = Trainer(MODEL, layout, WORKLOAD, settings, rank_map=rank_map, device=torch.device("cpu"))
    data = RepeatedData()
    for step in range(settings.steps):
        trainer.step(data, step, settings.learning_rate, sample_memory=False)
        records = trainer.record()
        losses += [] if records is None else [float(records.ranks["loss"].sum())]
    parameters = [each for chunk in trainer.chunks for each in chunk.parameters()]
    masters = {bucket.master.dtype for bucket in trainer.store.buckets}
    return losses, {each.dtype for each in parameters}, {each.grad.dtype for each in parameters} | masters


@pytest.mark.processes
def test_bfloat16_learns_with_gradients_and_masters_in_float32() -> None:
    for losses, weights, wide in run_ranks(2, run_in_bfloat16):
        assert (weights, wide) == ({torch.bfloat16}, {torch.float32})
        if losses:
            learned = losses
    losses = learned
    assert losses[0] == pytest.approx(5.55, abs=0.1) and losses[-1] < 3.0


@pytest.mark.processes
def test_spans_of_a_step_nest_in_it(tmp_path: Path) -> None:
    for _, spans, _ in run_ranks(4, run, tmp_path, 3):
        first = spans[0]
        assert all(first.start_s <= span.start_s <= span.end_s <= first.end_s for span in spans)
        names = {(span.name, span.backward) for span in spans}
        regions = ("attention", "router", "dispatch", "expert", "combine", "head")
        assert {(name, backward) for name in regions for backward in (False, True)} <= names


@pytest.mark.processes
@pytest.mark.alone  # beside others a rank may need longer than the time-out for a step, and another ends first
# Of a whole command it is rank 0: tests/test_local_run.py.
@pytest.mark.parametrize("failing_rank", [pytest.param(0, marks=full), 3])
def test_error_on_one_rank_ends_all_ranks_within_the_time_out(failing_rank: int) -> None:
    for rank, (error, seconds) in enumerate(run_ranks(4, run_until_failure, failing_rank)):
        assert seconds < 3 * TIMEOUT_S + 5
        if rank == failing_rank:
            assert error == "OSError: the disk is gone"
        else:
            assert error.startswith("RuntimeError"), error
