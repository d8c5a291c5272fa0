"""Learning rates, and AdamW on flat masters whose state exists before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from piper_hpc.parallel.parameters import Bucket
from piper_hpc.train.optimizer import Optimizer, learning_rate
from piper_hpc.train.settings import TrainSettings

COSINE = TrainSettings(steps=101, learning_rate=1.0, minimum_learning_rate=0.1, schedule="cosine", warmup_steps=20)


def test_rate_rises_to_its_peak_and_falls_along_half_a_cosine() -> None:
    assert learning_rate(0, COSINE) == pytest.approx(1 / 20)
    assert learning_rate(19, COSINE) == learning_rate(20, COSINE) == 1.0
    assert learning_rate(60, COSINE) == pytest.approx(0.55)
    assert learning_rate(100, COSINE) == pytest.approx(0.1)
    rates = [learning_rate(step, COSINE) for step in range(20, 101)]
    assert rates == sorted(rates, reverse=True)


def test_constant_rate_stays() -> None:
    constant = replace(COSINE, schedule="constant", warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(101)} == {1.0}


class Chunk(nn.Module):
    """A matrix and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8, dtype=dtype))
        self.matrix = nn.Parameter(torch.ones(8, 4, dtype=dtype))


def bucket_of(chunk: Chunk) -> Bucket:
    return Bucket([("gain", chunk.gain), ("matrix", chunk.matrix)], group=None, zero=0, experts=())


def test_decay_is_for_matrices_alone() -> None:
    chunk = Chunk()
    bucket = bucket_of(chunk)
    Optimizer([bucket], replace(COSINE, weight_decay=0.5)).step(0.1)
    assert torch.allclose(chunk.matrix, torch.full((8, 4), 0.95)) and torch.equal(chunk.gain, torch.ones(8))


def test_flat_masters_take_the_steps_of_a_plain_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = Chunk(), Chunk()
    with torch.no_grad():
        ours.matrix.normal_()
        theirs.matrix.copy_(ours.matrix)
    bucket = bucket_of(ours)
    optimizer = Optimizer([bucket], replace(COSINE, weight_decay=0.1))
    plain = torch.optim.AdamW(
        [{"params": [theirs.matrix], "weight_decay": 0.1}, {"params": [theirs.gain], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    for _ in range(3):
        for chunk in (ours, theirs):
            for parameter in (chunk.matrix, chunk.gain):
                gradient = parameter.detach().sin()
                parameter.grad = gradient if parameter.grad is None else parameter.grad.copy_(gradient)
        optimizer.step(0.01)
        plain.step()
    assert torch.equal(ours.matrix, theirs.matrix) and torch.equal(ours.gain, theirs.gain)


def test_small_steps_add_up_in_the_master_of_a_bfloat16_weight() -> None:
    """At 3e-4 no single step moves a bf16 gain of 1.0, whose next value below is 0.996; forty of them do."""
    chunk = Chunk(torch.bfloat16)
    bucket = bucket_of(chunk)
    optimizer = Optimizer([bucket], replace(COSINE, weight_decay=0.0))
    assert (chunk.gain.dtype, chunk.gain.grad.dtype, bucket.master.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    for step in range(40):
        bucket.gradients.fill_(1.0)
        optimizer.step(3e-4)
        bucket.publish()
        assert step > 0 or torch.equal(chunk.gain, torch.ones(8, dtype=torch.bfloat16))
    assert bucket.master == pytest.approx(torch.full((40,), 1.0 - 40 * 3e-4), rel=1e-4)
    assert torch.equal(chunk.gain, bucket.master[32:].to(torch.bfloat16)) and chunk.gain[0].item() < 0.99
