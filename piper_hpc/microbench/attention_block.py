"""The attention operators of a layer, projections included, as one timed call: grouped-query and latent attention."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from piper_hpc.microbench.operator import Operator, bytes_of, close_to


class _Block:
    """Random weights of one layer's attention, and its input [1, sequence, hidden].

    Grouped-query attention (arXiv 2305.13245) where kv_lora_rank = 0: one projection to queries, keys and values.
    Multi-head latent attention (arXiv 2405.04434 section 2.1) otherwise: low-rank pairs for queries (q_lora_rank = 0:
    one full matrix) and for keys and values, whose qk_rope_dim columns all heads share. Norms and rotary embeddings are
    left out: they stream, and have curves.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: dict[str, int]) -> None:
        self.shape = shape
        self.q_dim = shape["heads"] * shape["head_dim"]
        self.v_dim = shape["heads"] * shape["v_head_dim"]
        self.nope = shape["head_dim"] - shape["qk_rope_dim"]

        def matrix(inputs: int, outputs: int) -> torch.Tensor:
            weight = torch.randn(outputs, inputs, device=device, dtype=dtype) * inputs**-0.5
            return weight.requires_grad_()

        hidden, latent, query_rank = shape["hidden"], shape["kv_lora_rank"], shape["q_lora_rank"]
        if latent:
            query = [matrix(hidden, query_rank), matrix(query_rank, self.q_dim)] if query_rank else []
            self.query = query or [matrix(hidden, self.q_dim)]
            self.down = matrix(hidden, latent + shape["qk_rope_dim"])
            self.up = matrix(latent, shape["heads"] * self.nope + self.v_dim)
            weights = [*self.query, self.down, self.up]
        else:
            self.qkv = matrix(hidden, self.q_dim + shape["kv_heads"] * (shape["head_dim"] + shape["v_head_dim"]))
            weights = [self.qkv]
        self.output = matrix(self.v_dim, hidden)
        self.weights = [*weights, self.output]
        self.tokens = torch.randn(1, shape["sequence"], hidden, device=device, dtype=dtype).requires_grad_()

    @property
    def flops(self) -> float:
        """FLOPs of the forward: 2 s (parameters), and s^2 (q_dim + v_dim) for the two products of causal attention."""
        sequence = self.shape["sequence"]
        weights = sum(weight.numel() for weight in self.weights)
        return 2.0 * sequence * weights + float(sequence**2) * (self.q_dim + self.v_dim)

    def heads_of_values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [1, heads, s, head_dim], key and value [1, kv_heads, s, width]."""
        shape = self.shape

        def by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
            return rows.unflatten(-1, (heads, -1)).transpose(1, 2)

        if not shape["kv_lora_rank"]:
            kv_heads = shape["kv_heads"]
            widths = (self.q_dim, kv_heads * shape["head_dim"], kv_heads * shape["v_head_dim"])
            query, key, value = F.linear(self.tokens, self.qkv).split(widths, dim=-1)
            return by_head(query, shape["heads"]), by_head(key, kv_heads), by_head(value, kv_heads)
        query = self.tokens
        for weight in self.query:
            query = F.linear(query, weight)
        latent, shared = F.linear(self.tokens, self.down).split((shape["kv_lora_rank"], shape["qk_rope_dim"]), dim=-1)
        both = by_head(F.linear(latent, self.up), shape["heads"])
        key, value = both.split((self.nope, shape["v_head_dim"]), dim=-1)
        rotary = shared.unsqueeze(1).expand(-1, shape["heads"], -1, -1)
        return by_head(query, shape["heads"]), torch.cat((key, rotary), dim=-1), value

    def attended(self) -> torch.Tensor:
        """What attention hands to the output projection, [1, s, v_dim]."""
        query, key, value = self.heads_of_values()
        grouped = self.shape["kv_heads"] != self.shape["heads"]
        rows = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return rows.transpose(1, 2).flatten(2)

    def forward(self) -> torch.Tensor:
        """[1, s, hidden] to [1, s, hidden]."""
        return F.linear(self.attended(), self.output)


def attention_block_forward(device: torch.device, dtype: torch.dtype, **shape: int) -> Operator:
    """Projections and causal attention of one sequence, forward, with autograd recording."""
    block = _Block(device, dtype, shape)
    # The first position sees itself alone: its own value, once for each query head that shares it.
    _, _, value = block.heads_of_values()
    own = value[:, :, 0].repeat_interleave(shape["heads"] // shape["kv_heads"], dim=1).flatten(1)
    output = block.forward()
    correct = close_to(output[:, 0].detach(), F.linear(own.double(), block.output.double()).detach(), dtype)
    return Operator("flops", block.flops, block.forward, correct, bytes_of(block.tokens, output, *block.weights))


def attention_block_backward(device: torch.device, dtype: torch.dtype, **shape: int) -> Operator:
    """The backward of `attention_block_forward` alone, to tokens and weights; work is counted as its forward's."""
    block = _Block(device, dtype, shape)
    attended = block.attended()
    output = F.linear(attended, block.output)
    gradient = torch.randn_like(output)
    inputs = [block.tokens, *block.weights]

    def call() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    # The output projection's gradient is gradient^T attended; held against it by one random vector.
    probe = torch.randn(attended.shape[-1], dtype=torch.float64, device=device)
    expected = gradient[0].double().t() @ (attended[0].double() @ probe)
    correct = close_to((call()[-1].double() @ probe).detach(), expected.detach(), dtype)
    return Operator("flops", block.flops, call, correct, 2 * bytes_of(block.tokens, output, *block.weights))
