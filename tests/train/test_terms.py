"""Honest terms: a delay put into one place of the code moves that term by the delay, and no other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from piper_hpc.comm.flat import FlatDispatcher
from piper_hpc.model.attention import Attention
from piper_hpc.model.experts import Experts
from piper_hpc.model.layer import MoELayer
from piper_hpc.model.router import Router
from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.parallel.pipeline import Pipeline, TokenLoss
from piper_hpc.spec import TERMS, Layout, ModelSpec, RankMap, Workload
from piper_hpc.train import metrics
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=2, hidden=16, heads=2, kv_heads=2, head_dim=8, experts=4, top_k=2, expert_ffn=16, vocab=32
)
WORKLOAD = Workload(global_batch=4, sequence=8)
DELAY_S = 0.04
REPEATS = 10
LAYER_CALLS = 2 * 2  # layers, micro-batches

PLACES: dict[str, tuple[Any, str, int]] = {
    "attention_s": (Attention, "forward", LAYER_CALLS),
    "router_s": (Router, "forward", LAYER_CALLS),
    "expert_s": (Experts, "forward", LAYER_CALLS),
    "dispatch_s": (FlatDispatcher, "dispatch", LAYER_CALLS),
    "combine_s": (FlatDispatcher, "combine", LAYER_CALLS),
    "other_s": (MoELayer, "forward", LAYER_CALLS),
    "head_s": (TokenLoss, "_loss", 2),
    "host_s": (Pipeline, "step", 1),
    "grad_reduce_s": (ParameterStore, "finish_reduction", 1),
    "optimizer_s": (torch.optim.AdamW, "step", 1),
}
"""Where each term's work is done, and how often in a step."""


class Tokens:
    """The same tokens at every step."""

    def __init__(self, sequences: int) -> None:
        self.tokens = torch.arange(sequences * 9).view(sequences, 9) % MODEL.vocab

    def batch(self, first_sample: int) -> torch.Tensor:
        return self.tokens


class SlowBackward(torch.autograd.Function):
    """Identity whose backward takes `delay_s`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, delay_s: float) -> torch.Tensor:
        ctx.delay_s = delay_s
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.delay_s)
        return gradient, None


def slow_call(owner: Any, name: str, delay_s: float) -> Any:
    """Patch that sleeps before the call."""
    original = getattr(owner, name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(delay_s)
        return original(*args, **kwargs)

    return patch.object(owner, name, slow)


def slow_backward(owner: Any, name: str, delay_s: float) -> Any:
    """Patch that makes the backward of the call's result slow."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *args: SlowBackward.apply(original(*args), delay_s))


@contextmanager
def slow_transfers(delay_s: float) -> Iterator[None]:
    """Every wait for a message between stages takes `delay_s` longer after the message was posted."""
    original = schedules._wait_batch_p2p

    def slow(works: list[Any]) -> None:
        original(works)
        if works:
            time.sleep(delay_s)

    with patch.object(schedules, "_wait_batch_p2p", slow):
        yield


def slow_first_stage(delay_s: float) -> Any:
    """Attention is slow on the ranks of stage 0 of PP2 x EP1."""
    return slow_call(Attention, "forward", delay_s if dist.get_rank() == 0 else 0.0)


def changes(layout: Layout, patches: Callable[..., Any], *arguments: Any) -> list[dict[str, float]] | None:
    """On rank 0: by stage, how each term moves when steps run inside `patches(*arguments)`.

    Compares the smallest of each kind: other work on the machine can only add to a term. It can also shorten a bubble,
    by slowing the stage that waits, so there the median counts.
    """
    rank_map = RankMap.block(layout, layout.ranks, (0,))
    settings = TrainSettings(steps=1, collective_timeout_s=30.0)
    trainer = Trainer(MODEL, layout, WORKLOAD, settings, rank_map=rank_map, device=torch.device("cpu"))
    data = Tokens(WORKLOAD.global_batch // layout.dense_dp)

    def step() -> dict[str, Any] | None:
        trainer.step(data, 0, 1e-3, sample_memory=False)
        records = trainer.record()
        return None if records is None else metrics.summarise(records, layout, tokens=1)

    for _ in range(2):
        step()
    plain, slow = [], []
    for _ in range(REPEATS):
        plain.append(step())
        with patches(*arguments):
            slow.append(step())
    if dist.get_rank() != 0:
        return None

    def undisturbed(rows: list[Any], stage: int, term: str) -> float:
        values = [row["stages"][stage][term] for row in rows]
        return median(values) if term == "bubble_s" else min(values)

    return [
        {term: undisturbed(slow, stage, term) - undisturbed(plain, stage, term) for term in TERMS}
        for stage in range(layout.pp)
    ]


def expect_moved(moved: dict[str, float], term: str, by_s: float, *, free: tuple[str, ...] = ()) -> None:
    """`term` moved by `by_s` within a fifth, and the others (but for `free`) by less than a quarter of it."""
    assert moved[term] == pytest.approx(by_s, rel=0.2), moved
    others = {name: change for name, change in moved.items() if name not in (term, *free)}
    assert max(abs(change) for change in others.values()) < 0.25 * by_s, moved


def expect_changes(check: Callable[[list[dict[str, float]]], None], layout: Layout, *arguments: Any) -> None:
    """`check` holds for `changes` in one of three tries: other work can spoil one, a wrong term spoils all."""
    for tries_left in (2, 1, 0):
        try:
            return check(run_ranks(2, changes, layout, *arguments)[0])
        except AssertionError:
            if tries_left == 0:
                raise


@pytest.mark.processes
@pytest.mark.alone
@pytest.mark.parametrize(
    ("term", "slow"),
    [(term, slow_call) for term in PLACES]
    + [(term, slow_backward) for term in ("attention_s", "expert_s", "combine_s")],
)
def test_delay_in_one_place_moves_its_term_alone(term: str, slow: Callable[..., Any]) -> None:
    owner, name, calls = PLACES[term]
    layout = Layout(ep=2, micro_batch=1)
    expect_changes(lambda moved: expect_moved(moved[0], term, DELAY_S), layout, slow, owner, name, DELAY_S / calls)


@pytest.mark.processes
@pytest.mark.alone
def test_slow_transfer_between_stages_is_p2p() -> None:
    """Two micro-batches: each stage waits for two messages and for two of its own to leave."""

    def check(moved: list[dict[str, float]]) -> None:
        for stage in moved:
            expect_moved(stage, "p2p_s", 4 * DELAY_S, free=("bubble_s",))

    expect_changes(check, Layout(pp=2, micro_batch=2), slow_transfers, DELAY_S)


@pytest.mark.processes
@pytest.mark.alone
def test_slow_stage_is_a_bubble_for_the_other() -> None:
    """Stage 0 works longer on each micro-batch: its own term moves, stage 1 waits before the messages are posted."""

    def check(moved: list[dict[str, float]]) -> None:
        first, second = moved
        expect_moved(first, "attention_s", 2 * DELAY_S)
        expect_moved(second, "bubble_s", 2 * DELAY_S)

    expect_changes(check, Layout(pp=2, micro_batch=2), slow_first_stage, DELAY_S)
