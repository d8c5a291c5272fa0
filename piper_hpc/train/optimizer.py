"""AdamW on flat master weights, its state ready before the first step, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from piper_hpc.parallel.parameters import Bucket
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


MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of every element, flat and in the order of a bucket's master."""


class Optimizer:
    """Fused AdamW (arXiv 1711.05101) on the flat masters of a parameter store, weight decay on matrices alone.

    Moments exist from the start, so that memory is the same from the first step on and a checkpoint can be loaded into
    them. `moments[i]` are those of bucket i, [master size] each.
    """

    def __init__(self, buckets: Sequence[Bucket], settings: TrainSettings) -> None:
        self.moments = [{name: torch.zeros_like(bucket.master) for name in MOMENTS} for bucket in buckets]
        self._parts: list[torch.Tensor] = []
        groups: list[dict[str, Any]] = []
        states = []
        for bucket, moments in zip(buckets, self.moments, strict=True):
            for decay, part in ((settings.weight_decay, slice(bucket.decayed)), (0.0, slice(bucket.decayed, None))):
                master = bucket.master[part].detach()
                if not len(master):
                    continue
                master.grad = bucket.reduced[part]
                groups.append({"params": [master], "weight_decay": decay})
                states.append((master, {name: moments[name][part] for name in MOMENTS}))
        self._adamw = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, fused=True
        )
        for master, state in states:
            self._adamw.state[master] = {"step": torch.zeros((), device=master.device)} | state

    def step(self, rate: float) -> None:
        """One update of all masters at the learning rate `rate`."""
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()

    @property
    def steps(self) -> int:
        """Updates so far, which AdamW corrects its moments' bias by."""
        return int(next(iter(self._adamw.state.values()))["step"])

    @steps.setter
    def steps(self, done: int) -> None:
        for state in self._adamw.state.values():
            state["step"].fill_(done)
