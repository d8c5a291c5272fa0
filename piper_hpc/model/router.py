"""The top-k router: score, select, weigh, and the losses that balance it, defined so that no layout changes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from piper_hpc.spec.model import ModelSpec


class Routed(NamedTuple):
    """What a router makes of tokens: expert_ids int64 and weights, both [tokens, top_k].

    counts: int64 [experts], choices of each; aux_loss: a scalar without gradient, its share of the balancing losses.
    """

    expert_ids: torch.Tensor
    weights: torch.Tensor
    counts: torch.Tensor
    aux_loss: torch.Tensor


class Router(nn.Module):
    """Scores of a linear gate, the top-k experts of each token, and their weights.

    Softmax or sigmoid scores; weights normalised over the chosen ones where the spec says so. Of one choice the weight
    is its score, as in Switch Transformer (arXiv 2101.03961 Eq 2): normalised it would be 1 whatever the gate says, and
    the task's loss would not reach the gate. Choice may be limited to a token's best groups (arXiv 2405.04434 2.2.2)
    and moved by `selection_bias`, which has no gradient (arXiv 2408.15664).

    aux_scale: the factor of one sequence's losses in the loss of a step: one over global sequences. The losses are
    attached to the weights, so they need no path of their own through the pipeline. `load`, each expert's share of
    choices over the mean in the step before, is what a loss over the global batch takes for this one's.
    A forward changes nothing: what it routed is in what it returns. selection_bias and load, float32 [experts] in the
    wider type where training is, are the state of a router; `after_step` moves them, and checkpoints keep them.
    """

    selection_bias: torch.Tensor
    load: torch.Tensor

    def __init__(self, spec: ModelSpec, aux_scale: float, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.aux_scale = aux_scale
        self.gate = nn.Linear(spec.hidden, spec.experts, bias=spec.router_bias, device=device, dtype=dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if spec.selection_bias:
            self.register_buffer("selection_bias", torch.zeros(spec.experts, dtype=wide, device=device))
        if spec.router_aux == "global_batch":
            self.register_buffer("load", torch.ones(spec.experts, dtype=wide, device=device))

    def forward(self, hidden: torch.Tensor, forced: torch.Tensor | None = None) -> Routed:
        """hidden [batch, sequence, hidden]. forced: experts int64 [batch * sequence, top_k] that tokens go to whatever
        the gate says, for measurements; weights stay the gate's."""
        spec = self.spec
        logits = self._logits(hidden)
        scores = logits.sigmoid() if spec.router_score == "sigmoid" else logits.softmax(-1)
        if forced is not None:
            expert_ids = forced.view(*scores.shape[:-1], spec.top_k)
        elif spec.selection_bias or spec.expert_groups:
            expert_ids = self._selected(scores.detach())
        else:
            expert_ids = scores.topk(spec.top_k, dim=-1).indices
        weights = scores.gather(-1, expert_ids)
        if spec.normalised_weights and spec.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        if spec.routed_scale != 1:
            weights = weights * spec.routed_scale
        counts = count_choices(expert_ids, spec.experts)
        aux_loss = self._losses(logits, scores, counts)
        weights = AttachLoss.apply(weights, aux_loss)
        return Routed(
            expert_ids.view(-1, spec.top_k),
            weights.view(-1, spec.top_k).to(hidden.dtype),
            counts.sum(0),
            aux_loss.detach(),
        )

    def after_step(self, counts: torch.Tensor) -> None:
        """Move the state by the step's choices of each expert over all ranks, int64 [experts]: the same on each."""
        mean = counts.double().mean()
        if self.spec.selection_bias:
            step = self.spec.selection_bias_rate * torch.sign(mean - counts)
            self.selection_bias += step.to(self.selection_bias)
        if self.spec.router_aux == "global_batch":
            self.load.copy_(counts / mean)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, experts] in float32 at least."""
        narrow = hidden.dtype in (torch.bfloat16, torch.float16)
        if narrow and self.spec.fp32_gate:
            bias = self.gate.bias.float() if self.gate.bias is not None else None
            return F.linear(hidden.float(), self.gate.weight.float(), bias)
        logits = self.gate(hidden)
        return logits.float() if narrow else logits

    def _selected(self, scores: torch.Tensor) -> torch.Tensor:
        """Experts by score and bias, in the best groups alone: int64 [batch, sequence, top_k]."""
        spec = self.spec
        if spec.selection_bias:
            scores = scores + self.selection_bias
        if spec.expert_groups:
            by_group = scores.unflatten(-1, (spec.expert_groups, -1))
            deciding = min(2, by_group.shape[-1]) if spec.selection_bias else 1
            group_score = by_group.topk(deciding, dim=-1).values.sum(-1)
            best = group_score.topk(spec.groups_per_token, dim=-1).indices
            open_to = torch.zeros_like(group_score, dtype=torch.bool).scatter_(-1, best, True)
            scores = by_group.masked_fill(~open_to.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.topk(spec.top_k, dim=-1).indices

    def _losses(self, logits: torch.Tensor, scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the step's balancing losses, a scalar."""
        spec = self.spec
        shares = scores / scores.sum(-1, keepdim=True) if spec.router_score == "sigmoid" else scores
        if spec.router_aux == "global_batch":
            loss = (self.load.to(shares.dtype) * shares.mean(1)).sum(-1)
        else:
            loss = balancing_loss(shares, counts, spec.top_k)
        loss = spec.router_aux_coef * loss.sum()
        if spec.router_z_coef:
            loss = loss + spec.router_z_coef * logits.logsumexp(-1).square().mean(1).sum()
        return self.aux_scale * loss


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
