"""Compute operators of a training step, each at one shape: what to call, how much work it does, whether it is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F

from piper_hpc.microbench.operator import Operator, bytes_of, close_to, ring
from piper_hpc.microbench.routing import combine_rows, dispatch_rows, router
from piper_hpc.microbench.shapes import Shape


def _product_agrees(a: torch.Tensor, b: torch.Tensor, product: torch.Tensor) -> bool:
    """Freivalds' check (1977) of product [m, n] = a [m, k] b [k, n]: both sides times one random vector, in float64."""
    vector = torch.randn(b.shape[1], 1, dtype=torch.float64, device=b.device)
    return close_to(product.double() @ vector, a.double() @ (b.double() @ vector), product.dtype)


def gemm(device: torch.device, dtype: torch.dtype, *, m: int, n: int, k: int) -> Operator:
    """[m, k] times [k, n], a linear layer without bias: 2 m n k FLOPs."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype).t()
    product = a @ b
    return Operator("flops", 2.0 * m * n * k, lambda: a @ b, _product_agrees(a, b, product), bytes_of(a, b, product))


def grouped_gemm(
    device: torch.device, dtype: torch.dtype, *, experts: int, tokens: int, hidden: int, ffn: int
) -> Operator:
    """`tokens` rows shared equally by `experts` weights [hidden, ffn]: 2 tokens hidden ffn FLOPs, forward."""
    rows = torch.randn(tokens, hidden, device=device, dtype=dtype)
    weights = torch.randn(experts, hidden, ffn, device=device, dtype=dtype)
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (tokens // experts)

    def call() -> torch.Tensor:
        return F.grouped_mm(rows, weights, offs=ends)

    products = call()
    groups = zip(rows.chunk(experts), weights, products.chunk(experts), strict=True)
    correct = all(_product_agrees(row, weight, product) for row, weight, product in groups)
    return Operator("flops", 2.0 * tokens * hidden * ffn, call, correct, bytes_of(rows, weights, products))


def _attention_inputs(
    device: torch.device, dtype: torch.dtype, batch: int, heads: int, kv_heads: int, sequence: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [batch, heads, sequence, head_dim], key and value [batch, kv_heads, sequence, head_dim], with gradients."""
    query, key, value = (
        torch.randn(batch, own, sequence, head_dim, device=device, dtype=dtype) for own in (heads, kv_heads, kv_heads)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def _attention_flops(batch: int, heads: int, sequence: int, head_dim: int) -> float:
    """FLOPs of causal attention forward: 2 products of 2 b s^2 (heads head_dim) each, half of it by causality.

    Counted as FlashAttention's benchmarks do (arXiv 2307.08691 section 4.1): 4 s^2 head_dim heads, halved.
    """
    return 2.0 * batch * sequence**2 * heads * head_dim


def attention_forward(
    device: torch.device, dtype: torch.dtype, *, batch: int, heads: int, sequence: int, head_dim: int, kv_heads: int = 0
) -> Operator:
    """Causal scaled-dot-product attention with autograd recording, forward; kv_heads: 0 for one to each head."""
    kv_heads = kv_heads or heads
    inputs = _attention_inputs(device, dtype, batch, heads, kv_heads, sequence, head_dim)

    def call() -> torch.Tensor:
        return F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=kv_heads != heads)

    # The first position sees itself alone, so its output is its own value, once for each head that shares it.
    own = inputs[2][:, :, 0].repeat_interleave(heads // kv_heads, dim=1)
    correct = close_to(call()[:, :, 0].detach(), own.detach(), dtype)
    flops = _attention_flops(batch, heads, sequence, head_dim)
    return Operator("flops", flops, call, correct, bytes_of(*inputs, inputs[0]))


def attention_backward(
    device: torch.device, dtype: torch.dtype, *, batch: int, heads: int, sequence: int, head_dim: int, kv_heads: int = 0
) -> Operator:
    """The backward of `attention_forward` alone; its work is counted as that of the forward."""
    kv_heads = kv_heads or heads
    inputs = _attention_inputs(device, dtype, batch, heads, kv_heads, sequence, head_dim)
    output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=kv_heads != heads)
    gradient = torch.randn_like(output)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    # Weights of one position sum to 1, so the values' gradients sum to the outputs' gradients of all heads that share.
    shared = gradient.float().sum(dim=2).unflatten(1, (kv_heads, -1)).sum(dim=2)
    correct = close_to(call()[2].float().sum(dim=2), shared, dtype)
    flops = _attention_flops(batch, heads, sequence, head_dim)
    return Operator("flops", flops, call, correct, 2 * bytes_of(*inputs, output))


def elementwise(device: torch.device, dtype: torch.dtype, *, elements: int) -> Operator:
    """The sum of two tensors into a new one: three streams of bytes."""
    a = torch.randn(elements, device=device, dtype=dtype)
    b = torch.ones(elements, device=device, dtype=dtype)
    correct = close_to((a + b)[-4096:], a[-4096:].double() + 1, dtype)
    moved = 3 * bytes_of(a)
    return Operator("bytes", float(moved), lambda: a + b, correct, moved)


def activation(device: torch.device, dtype: torch.dtype, *, elements: int) -> Operator:
    """SiLU of one tensor into a new one: two streams of bytes, and an exponential for each value."""
    values = torch.randn(elements, device=device, dtype=dtype)
    tail = values[-4096:].double()
    correct = close_to(F.silu(values)[-4096:], tail / (1 + (-tail).exp()), dtype)
    moved = 2 * bytes_of(values)
    return Operator("bytes", float(moved), lambda: F.silu(values), correct, moved)


def norm(device: torch.device, dtype: torch.dtype, *, tokens: int, hidden: int) -> Operator:
    """RMSNorm (arXiv 1910.07467) of [tokens, hidden] and its backward, to input and weight.

    Its work is the bytes of the forward alone: input read, output written.
    """
    values = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
    weight = torch.ones(hidden, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(tokens, hidden, device=device, dtype=dtype)

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.rms_norm(values, (hidden,), weight, eps=1e-6), (values, weight), gradient)

    exact = values.detach().double()
    normalised = exact / exact.square().mean(-1, keepdim=True).sqrt()
    correct = close_to(call()[1], (gradient.double() * normalised).sum(0), dtype)
    return Operator("bytes", 2.0 * bytes_of(values), call, correct, 4 * bytes_of(values))


def gather(device: torch.device, dtype: torch.dtype, *, rows: int, hidden: int) -> Operator:
    """Rows [rows, hidden] copied in another order, as a dispatcher sorts them: two streams of bytes."""
    values = torch.randn(rows, hidden, device=device, dtype=dtype)
    order = torch.randperm(rows).to(device)
    sorted_back = values.index_select(0, order).index_select(0, order.argsort())
    moved = 2 * bytes_of(values)
    correct = torch.equal(sorted_back, values)
    return Operator("bytes", float(moved), lambda: values.index_select(0, order), correct, moved)


def sort(device: torch.device, dtype: torch.dtype, *, values: int) -> Operator:
    """The stable order of `values` small integers, as rows are sorted by expert."""
    keys = torch.randint(0, 64, (values,)).to(device)
    steps = keys[keys.argsort(stable=True)].diff()
    return Operator(
        "values", float(values), lambda: keys.argsort(stable=True), bool((steps >= 0).all()), 2 * bytes_of(keys)
    )


def adamw(device: torch.device, dtype: torch.dtype, *, parameters: int, tensors: int) -> Operator:
    """One step of torch's fused AdamW (arXiv 1711.05101) on `tensors` equal tensors that hold `parameters` in all."""
    rate, decay = 0.1, 0.1
    size = parameters // tensors
    weights = [torch.nn.Parameter(torch.ones(size, device=device, dtype=dtype)) for _ in range(tensors)]
    for weight in weights:
        weight.grad = torch.full_like(weight, 0.5)
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=decay, fused=True)
    optimizer.step()
    # The first step of Adam moves a weight by its rate against the gradient's sign, after its decay.
    correct = close_to(weights[-1].detach(), torch.full_like(weights[-1], 1 - rate * decay - rate), dtype)
    return Operator("parameters", float(parameters), optimizer.step, correct, 4 * bytes_of(*weights))


def host_op(device: torch.device, dtype: torch.dtype, *, operations: int) -> Operator:
    """`operations` tiny eager operations, recorded by autograd, and their backward: the cost of launching work."""
    start = torch.ones(8, device=device, dtype=dtype, requires_grad=True)
    factor = torch.ones(8, device=device, dtype=dtype)

    def call() -> torch.Tensor:
        value = start
        for _ in range(operations // 2):
            value = value * factor + factor
        (gradient,) = torch.autograd.grad(value, start, factor)
        return gradient

    return Operator("operations", float(operations), call, close_to(call(), factor, dtype))


_BUILDERS: dict[str, Callable[..., Operator]] = {
    "gemm": gemm,
    "grouped_gemm": grouped_gemm,
    "attention_forward": attention_forward,
    "attention_backward": attention_backward,
    "elementwise": elementwise,
    "activation": activation,
    "norm": norm,
    "router": router,
    "dispatch_rows": dispatch_rows,
    "combine_rows": combine_rows,
    "gather": gather,
    "sort": sort,
    "adamw": adamw,
    "host_op": host_op,
}


def build(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Operator:
    """The operator `name` at `shape` on `device`, as a ring of itself; its first call has been made and checked."""
    return ring(partial(_BUILDERS[name], device, dtype, **shape), device)
