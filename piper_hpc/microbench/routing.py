"""What a layer does to route its tokens, measured whole on the layer's own code: so many small operations, autograd
functions in Python among them, that a sum of their curves comes out at half of what they take."""

from __future__ import annotations

import torch

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.flat_plan import FlatHandle, FlatPlan
from piper_hpc.microbench.operator import Operator, bytes_of, close_to
from piper_hpc.model.router import Router
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.expert_placement import ExpertPlacement


def router(device: torch.device, dtype: torch.dtype, *, tokens: int, experts: int, top_k: int) -> Operator:
    """Scores of tokens [1, tokens, 1], the choice, weights and balancing loss of a router, and its backward.

    A token is one number, so that the product of the gate, which has a curve, is next to nothing. Its work is the
    scores: rows are short, and a CPU vectorises along a row.
    """
    spec = ModelSpec(
        "router", layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, experts=experts, top_k=top_k, expert_ffn=1,
        vocab=1,
    )  # fmt: skip
    route = Router(spec, 1.0, device=device, dtype=dtype)
    hidden = torch.randn(1, tokens, 1, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, top_k, device=device, dtype=dtype)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(route(hidden).weights, (hidden, route.gate.weight), gradient)

    # Shares that are equal may be chosen either way: the choice must be as large as the largest, and all else follows.
    exact = Router(spec, 1.0, device=device, dtype=torch.float64)
    exact.load_state_dict({name: value.double() for name, value in route.state_dict().items()})
    inputs, chosen = hidden.detach().double().requires_grad_(), route(hidden).expert_ids
    scores = exact.gate(inputs)[0].softmax(-1)
    expected = exact(inputs, chosen)
    exact_gradients = torch.autograd.grad(expected.weights, (inputs, exact.gate.weight), gradient.double())
    correct = (
        close_to(scores.gather(-1, chosen).sum(-1), scores.topk(top_k, dim=-1).values.sum(-1), dtype)
        and close_to(route(hidden).weights, expected.weights, dtype)
        and all(close_to(mine, right, dtype) for mine, right in zip(call(), exact_gradients, strict=True))
    )
    return Operator("values", float(tokens * experts), call, correct, 32 * scores.numel())


class _Rows:
    """Random tokens [tokens, hidden], choices and weights of each, and their rows on one rank."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, *, tokens: int, hidden: int, experts: int, top_k: int
    ) -> None:
        self.dispatcher, self.placement = FlatDispatcher(), ExpertPlacement.linear(experts, 1)
        self.tokens = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        shares, self.expert_ids = torch.rand(tokens, experts, device=device).topk(top_k, dim=-1)
        self.weights = (shares / shares.sum(-1, keepdim=True)).to(dtype).requires_grad_()
        self.bytes = top_k * bytes_of(self.tokens)

    def dispatched(self) -> tuple[torch.Tensor, FlatHandle[FlatPlan]]:
        """Rows in the order of their experts."""
        begun, handle = self.dispatcher.dispatch(self.tokens, self.expert_ids, self.weights, self.placement)
        return handle.rows(begun), handle


def dispatch_rows(device: torch.device, dtype: torch.dtype, **shape: int) -> Operator:
    """A dispatch of [tokens, hidden] to `top_k` of the experts of one rank, and its backward: all but the exchange.

    Its work is the bytes of the tokens' copies.
    """
    rows = _Rows(device, dtype, **shape)
    gradient = torch.randn_like(rows.dispatched()[0])

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rows.dispatched()[0], rows.tokens, gradient)

    plan = rows.dispatched()[1].plan
    by_expert = rows.expert_ids.reshape(-1)[plan.order]
    token_of_row = plan.order // rows.expert_ids.shape[-1]
    expected = torch.zeros_like(rows.tokens, dtype=torch.float64).index_add_(0, token_of_row, gradient.double())
    correct = (
        bool((by_expert.diff() >= 0).all())
        and torch.equal(rows.dispatched()[0], rows.tokens[token_of_row])
        and close_to(call()[0], expected, dtype)
    )
    return Operator("bytes", float(rows.bytes), call, correct, 3 * rows.bytes)


def combine_rows(device: torch.device, dtype: torch.dtype, **shape: int) -> Operator:
    """The combine of what `dispatch_rows` gave, and its backward: all but the exchange. Work is counted as there."""
    rows = _Rows(device, dtype, **shape)
    copies, handle = rows.dispatched()
    copies = copies.detach().requires_grad_()
    gradient = torch.randn_like(rows.tokens)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rows.dispatcher.combine(copies, handle), (copies, rows.weights), gradient)

    # Experts that change nothing return every token as it was, as its weights' sum is one.
    returned, (_, by_weight) = rows.dispatcher.combine(copies, handle).detach(), call()
    dot = (gradient.double() * rows.tokens.detach().double()).sum(-1, keepdim=True)
    correct = close_to(returned, rows.tokens.detach(), dtype) and close_to(by_weight, dot.expand_as(by_weight), dtype)
    return Operator("bytes", float(rows.bytes), call, correct, 3 * rows.bytes)
