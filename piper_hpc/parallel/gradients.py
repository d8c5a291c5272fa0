"""Gradient buffers of one rank: all-reduced over replicas, and clipped by their global norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from piper_hpc.model.names import is_expert
from piper_hpc.parallel.groups import Groups
from piper_hpc.spec.layout import Layout


class Gradients:
    """Every `parameter.grad` is a view into one of two flat buffers: dense parameters and experts.

    Dense parameters are replicated over the whole stage, experts over the replicas. The loss is a share of the step's
    loss (sum over tokens / global tokens), so both are summed, once, after the last micro-batch.
    """

    def __init__(self, stage: nn.Module, groups: Groups, layout: Layout) -> None:
        named = list(stage.named_parameters())
        self._dense = _flat_gradient(parameter for name, parameter in named if not is_expert(name))
        self._experts = _flat_gradient(parameter for name, parameter in named if is_expert(name))
        self._groups = groups
        self._dense_copies = layout.dense_dp
        self._expert_copies = layout.dp

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        self._dense.zero_()
        self._experts.zero_()

    def reduce(self) -> None:
        """Sum over the ranks that hold copies; afterwards copies have equal gradients."""
        if self._groups.stage is not None:
            dist.all_reduce(self._dense, group=self._groups.stage)
        if self._groups.replica is not None:
            dist.all_reduce(self._experts, group=self._groups.replica)

    def squared_norm(self) -> torch.Tensor:
        """This rank's share of the squared global norm, a float64 scalar; the shares of all ranks add up to it.

        A parameter with c copies counts 1/c on each rank that holds one, so that it counts once in the sum.
        """
        return _squares(self._dense) / self._dense_copies + _squares(self._experts) / self._expert_copies

    def clip(self, norm: torch.Tensor, max_norm: float) -> None:
        """Multiply all gradients by min(1, max_norm / (norm + 1e-6)), as torch's `clip_grad_norm_` does.

        norm: a scalar, the global L2 norm before clipping, in the units of the gradients, as is max_norm.
        """
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).to(self._dense.dtype)
        self._dense.mul_(scale)
        self._experts.mul_(scale)


def _flat_gradient(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """One zeroed buffer for the gradients of `parameters`, which become views of it."""
    listed = list(parameters)
    flat = listed[0].new_zeros(sum(parameter.numel() for parameter in listed))
    for parameter, part in zip(listed, flat.split([each.numel() for each in listed]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def _squares(flat: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if flat.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(flat, dtype=wide).double().square()
