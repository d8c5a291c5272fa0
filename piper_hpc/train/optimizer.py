"""AdamW with its learning rate, and its state ready before the first step."""

from __future__ import annotations

import math

import torch
from torch import nn

from piper_hpc.train.settings import TrainSettings


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then constant or half a cosine.

    With s the share of the steps after the warm-up that are done, the cosine is min + (max - min)(1 + cos(pi s)) / 2:
    one period of SGDR (arXiv 1608.03983 Eq 5), without restarts.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - settings.warmup_steps) / max(1, settings.steps - 1 - settings.warmup_steps)
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return settings.minimum_learning_rate + share * (settings.learning_rate - settings.minimum_learning_rate)


def make_optimizer(stage: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW (arXiv 1711.05101) over all parameters, weight decay on matrices alone; moments exist from the start.

    With the state in place, memory is the same from the first step on and a checkpoint can be loaded into it.
    """
    parameters = list(stage.parameters())
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for every parameter from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate
