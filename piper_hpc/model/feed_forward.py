"""Feed-forwards that every token passes, and the activation that they share with routed experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from piper_hpc.model import recompute
from piper_hpc.spec.model import ModelSpec

CLAMPED_SLOPE = 1.702
"""Of the sigmoid in gpt-oss's SwiGLU: x sigmoid(1.702 x) is close to GELU."""

Inner = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(gate, up) [..., inner], up None where there is no gate -> what the down projection is given, the same shape."""


def make_inner(spec: ModelSpec) -> Inner:
    """The model's activation: act(gate) * up (arXiv 2002.05202 Eq 6), act(gate) without up, or gpt-oss's form."""
    if spec.swiglu_limit:
        return partial(_clamped, spec.swiglu_limit)
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
    }

    def inner(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        name = spec.activation if spec.activation != "auto" else "gelu" if up is None else "silu"
        return functions[name](gate) if up is None else functions[name](gate) * up

    return inner


def _clamped(limit: float, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(CLAMPED_SLOPE * gate))


class FeedForward(nn.Module):
    """w2(inner(w1 x, w3 x)): of a dense layer, of shared experts side by side, or beside experts. w3 where gated."""

    def __init__(
        self,
        spec: ModelSpec,
        width: int,
        matrices: int,
        *,
        again: bool = False,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """width: inner; matrices: 3 with a gate, 2 without; again: compute the activation again in the backward."""
        super().__init__()
        self.run = recompute.again if again else recompute.kept
        self.inner = make_inner(spec)
        linear = partial(nn.Linear, bias=spec.ffn_bias, device=device, dtype=dtype)
        self.w1 = linear(spec.hidden, width)
        self.w3 = linear(spec.hidden, width) if matrices == 3 else None
        self.w2 = linear(width, spec.hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape."""
        up = None if self.w3 is None else self.w3(hidden)
        # The last product is inside, for it keeps the activation; run again, it stops short of computing that product.
        return self.run(lambda gate, up: self.w2(self.inner(gate, up)), self.w1(hidden), up)


class SharedExperts(nn.Module):
    """The experts that every token passes, as one feed-forward of their widths together, gated where the spec says so:
    sigmoid(gate x) * ffn(x) (Qwen2-MoE, arXiv 2407.10671)."""

    def __init__(self, spec: ModelSpec, *, again: bool = False, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width = spec.shared_experts * spec.shared_expert_ffn
        self.ffn = FeedForward(spec, width, spec.matrices_per_expert, again=again, device=device, dtype=dtype)
        self.gate: nn.Linear | None = None
        if spec.shared_expert_gate:
            self.gate = nn.Linear(spec.hidden, 1, bias=False, device=device, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> the same shape."""
        rows = self.ffn(tokens)
        return rows if self.gate is None else self.gate(tokens).sigmoid() * rows
