"""Global logical names of parameters, and their first values: both free of rank, placement and layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

EXPERT_WEIGHTS = ".experts."


def is_expert(name: str) -> bool:
    """Whether a parameter of a stage belongs to its experts (stacked, and split over the expert group)."""
    return EXPERT_WEIGHTS in name


ExpertsByLayer = Sequence[Sequence[int]]
"""By global layer: the logical experts that a rank holds of it, in the order of its stacks."""


def layer_of(name: str) -> int:
    """The global layer that a parameter `layers.<layer>. ...` belongs to."""
    return int(name.split(".")[1])


def logical_names(name: str, experts: ExpertsByLayer) -> list[str]:
    """Logical names in a parameter of a `Stage`: its own, or of a stack of experts one for each that it holds."""
    if not is_expert(name):
        return [name]
    prefix, weight = name.split(EXPERT_WEIGHTS)
    return [f"{prefix}{EXPERT_WEIGHTS}{expert}.{weight}" for expert in experts[layer_of(name)]]


def logical_tensors(
    named: Iterable[tuple[str, torch.Tensor]], experts: ExpertsByLayer
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor under its logical name; a stack `layers.3.experts.w1` gives `layers.3.experts.5.w1`, ... as views.

    named: tensors by the parameter names of a `Stage`, a stack of experts being [experts_per_rank, in, out] and
    what it gives [in, out] each.
    """
    for name, tensor in named:
        parts = tensor.unbind() if is_expert(name) else (tensor,)
        yield from zip(logical_names(name, experts), parts, strict=True)


@torch.no_grad()
def initialise(stage: nn.Module, experts: ExpertsByLayer, *, layers: int, seed: int) -> None:
    """Give every parameter its first value, a function of `seed` and its logical name alone.

    Normal with standard deviation 0.02, divided by sqrt(2 layers) where a matrix writes into the residual stream
    (GPT-2); norms start at one, biases and sinks at zero. Drawn in float32 on the host, so that devices and types start
    alike.
    """
    for name, tensor in logical_tensors(stage.named_parameters(), experts):
        if tensor.ndim == 1:
            tensor.fill_(0.0 if name.endswith(("bias", "sinks")) else 1.0)
            continue
        residual = name.endswith((".o.weight", ".w2", ".w2.weight"))
        std = 0.02 / math.sqrt(2 * layers) if residual else 0.02
        tensor.copy_(torch.empty(tensor.shape).normal_(std=std, generator=_generator(seed, name)))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
