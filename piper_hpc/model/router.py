"""The top-k router and its load-balancing loss, defined per sequence so that no layout changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from piper_hpc.model.recompute import is_rerun
from piper_hpc.spec.model import ModelSpec


class Router(nn.Module):
    """Softmax gate, top-k experts a token, weights normalised over the chosen ones, as Mixtral (arXiv 2401.04088) does.

    Of one choice the weight is its probability, as in Switch Transformer (arXiv 2101.03961 Eq 2): normalised it would
    be 1 whatever the gate says, and the task's loss would not reach the gate.
    `aux_scale` is the factor of one sequence's balancing loss in the loss of a step: coefficient over global sequences.
    The balancing loss is attached to the weights, so it needs no path of its own through the pipeline.
    `forced`, int64 [micro-batches of a step][batch * sequence, top_k], has experts that tokens go to whatever the gate
    says, for measurements; weights stay the gate's. Forwards come in the order of micro-batches, as do those that run
    again, which no schedule has that splits the backward.
    Since `reset`, `routed` has the choices of each expert by micro-batch, int64 [experts] each, and `aux_loss` adds up.
    """

    def __init__(self, spec: ModelSpec, aux_scale: float, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k = spec.top_k
        self.aux_scale = aux_scale
        self.gate = nn.Linear(spec.hidden, spec.experts, bias=False, device=device, dtype=dtype)
        self.forced: Sequence[torch.Tensor] | None = None
        self.routed: list[torch.Tensor] = []
        self._reruns = 0
        self.aux_loss = torch.zeros((), dtype=torch.float64, device=device)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [batch, sequence, hidden] -> expert_ids int64 and weights, both [batch * sequence, top_k]."""
        logits = self.gate(hidden)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        probabilities = logits.softmax(-1)
        if self.forced is None:
            chosen, expert_ids = probabilities.topk(self.top_k, dim=-1)
        else:
            micro_batch = self._reruns if is_rerun() else len(self.routed)
            self._reruns += is_rerun()
            expert_ids = self.forced[micro_batch].view(*probabilities.shape[:-1], self.top_k)
            chosen = probabilities.gather(-1, expert_ids)
        weights = chosen / chosen.sum(-1, keepdim=True) if self.top_k > 1 else chosen
        counts = count_choices(expert_ids, probabilities.shape[-1])
        aux_loss = self.aux_scale * balancing_loss(probabilities, counts, self.top_k).sum()
        if not is_rerun():
            self.routed.append(counts.sum(0))
            self.aux_loss += aux_loss.detach()
        weights = AttachLoss.apply(weights, aux_loss)
        return expert_ids.view(-1, self.top_k), weights.view(-1, self.top_k).to(hidden.dtype)

    def reset(self) -> None:
        """Begin a new step's sums."""
        self.routed.clear()
        self._reruns = 0
        self.aux_loss.zero_()


def count_choices(expert_ids: torch.Tensor, experts: int) -> torch.Tensor:
    """How often each sequence chose each expert: ids [batch, sequence, top_k] -> int64 [batch, experts]."""
    flat = expert_ids.flatten(1)
    counts = torch.zeros(flat.shape[0], experts, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(1, flat, torch.ones_like(flat))


def balancing_loss(probabilities: torch.Tensor, counts: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sequence-wise balance loss, [batch]; 1 when a sequence spreads evenly (arXiv 2412.19437 Eq 17-20).

    probabilities [batch, sequence, experts]; counts [batch, experts]: choices of each sequence, not differentiated.
    """
    _, sequence, experts = probabilities.shape
    fraction = counts.to(probabilities.dtype) * (experts / (top_k * sequence))
    return (fraction * probabilities.mean(1)).sum(-1)


class AttachLoss(torch.autograd.Function):
    """Identity on the first argument, of any shape; the second, a scalar, joins the loss of the step with factor one.

    The backward passes the gradient of the first on and gives the scalar a gradient of 1.
    """

    @staticmethod
    def forward(ctx: Any, carrier: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gradient, torch.ones((), dtype=ctx.loss_dtype, device=ctx.loss_device)
