"""Learning rates, and AdamW whose state exists before the first step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from piper_hpc.train.optimizer import learning_rate, make_optimizer, set_learning_rate
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


def test_decay_is_for_matrices_alone() -> None:
    module = nn.Linear(4, 4)
    optimizer = make_optimizer(module, replace(COSINE, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(1.0)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(module.weight, torch.full((4, 4), 0.95)) and torch.equal(module.bias, torch.ones(4))


def test_prepared_state_gives_the_steps_of_a_fresh_optimizer() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(8, 8), nn.Linear(8, 8)
    theirs.load_state_dict(ours.state_dict())
    optimizer = make_optimizer(ours, replace(COSINE, weight_decay=0.1, learning_rate=0.01))
    fresh = torch.optim.AdamW(
        [{"params": [theirs.weight], "weight_decay": 0.1}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.01, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    for _ in range(3):
        for module, steps in ((ours, optimizer), (theirs, fresh)):
            for parameter in module.parameters():
                parameter.grad = parameter.detach().sin()
            steps.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
