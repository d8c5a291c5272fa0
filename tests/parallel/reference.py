"""The same mathematics in one process and plain torch: no dispatcher, no pipeline, no grouped experts, no shared code.

Parameters are a dictionary by logical name. Every expert is applied to every token and weighted by zero where the
token did not choose it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from piper_hpc.spec import ModelSpec

Parameters = dict[str, torch.Tensor]


@dataclass
class Reference:
    """A model in training: parameters (leaves that require gradients) and the two moments of each."""

    spec: ModelSpec
    parameters: Parameters
    steps: int = 0
    first_moment: Parameters = field(default_factory=dict)
    second_moment: Parameters = field(default_factory=dict)

    def losses(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy a token and balancing loss of tokens [sequences, sequence + 1], the whole global batch."""
        hidden = self.parameters["embedding.weight"][tokens[:, :-1]]
        balance = hidden.new_zeros(())
        for layer in range(self.spec.layers):
            hidden = hidden + self._attention(layer, self._norm(f"layers.{layer}.attention_norm", hidden))
            mixed, layer_balance = self._experts(layer, self._norm(f"layers.{layer}.router_norm", hidden))
            hidden, balance = hidden + mixed, balance + layer_balance
        logits = self._norm("norm", hidden) @ self.parameters["head.weight"].T
        log_probability = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])
        return -log_probability.mean(), self.spec.router_aux_coef * balance

    def gradients(self, tokens: torch.Tensor) -> tuple[float, float, Parameters]:
        """Both losses, and the gradient of their sum by parameter."""
        loss, balance = self.losses(tokens)
        for parameter in self.parameters.values():
            parameter.grad = None
        (loss + balance).backward()
        return loss.item(), balance.item(), {name: each.grad.clone() for name, each in self.parameters.items()}

    def step(
        self, gradients: Parameters, *, rate: float, clip: float, decay: float, betas: tuple[float, float]
    ) -> None:
        """Clip by the global norm, then AdamW (arXiv 1711.05101), decay on matrices only."""
        norm = torch.sqrt(sum((gradient.double() ** 2).sum() for gradient in gradients.values()))
        scale = min(1.0, clip / (norm.item() + 1e-6))
        self.steps += 1
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                gradient = gradients[name] * scale
                m = self.first_moment.get(name, torch.zeros_like(parameter))
                v = self.second_moment.get(name, torch.zeros_like(parameter))
                m = self.first_moment[name] = betas[0] * m + (1 - betas[0]) * gradient
                v = self.second_moment[name] = betas[1] * v + (1 - betas[1]) * gradient**2
                m_hat, v_hat = m / (1 - betas[0] ** self.steps), v / (1 - betas[1] ** self.steps)
                if parameter.ndim > 1:
                    parameter -= rate * decay * parameter
                parameter -= rate * m_hat / (v_hat.sqrt() + 1e-8)

    def _norm(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        scale = (hidden.pow(2).mean(-1, keepdim=True) + self.spec.norm_eps).rsqrt()
        return hidden * scale * self.parameters[f"{name}.weight"]

    def _attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        spec, (batch, sequence, _) = self.spec, hidden.shape

        def heads(letter: str, count: int) -> torch.Tensor:
            projected = hidden @ self.parameters[f"layers.{layer}.attention.{letter}.weight"].T
            return projected.view(batch, sequence, count, spec.head_dim)

        query, key = (self._rotated(heads(letter, n)) for letter, n in (("q", spec.heads), ("k", spec.kv_heads)))
        share = spec.heads // spec.kv_heads
        key, value = (each.repeat_interleave(share, dim=2) for each in (key, heads("v", spec.kv_heads)))
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / spec.head_dim**0.5
        future = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)
        attended = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -torch.inf).softmax(-1), value)
        return attended.reshape(batch, sequence, -1) @ self.parameters[f"layers.{layer}.attention.o.weight"].T

    def _rotated(self, heads: torch.Tensor) -> torch.Tensor:
        sequence, half = heads.shape[1], self.spec.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / half
        angles = torch.arange(sequence, dtype=torch.float64)[:, None] * self.spec.rope_theta**-exponents
        turn = torch.polar(torch.ones_like(angles), angles).to(heads.dtype.to_complex())[:, None, :]
        turned = torch.complex(heads[..., :half].contiguous(), heads[..., half:].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def _experts(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        spec, prefix = self.spec, f"layers.{layer}"
        probability = (hidden @ self.parameters[f"{prefix}.router.gate.weight"].T).softmax(-1)
        threshold = probability.sort(-1, descending=True).values[..., spec.top_k - 1 : spec.top_k]
        chosen = probability >= threshold
        weight = torch.where(chosen, probability, 0.0)
        if spec.top_k > 1:  # one choice keeps its probability: as in Switch Transformer, not as in Mixtral
            weight = weight / weight.sum(-1, keepdim=True)
        mixed = torch.zeros_like(hidden)
        for expert in range(spec.experts):
            w1, w2 = (self.parameters[f"{prefix}.experts.{expert}.{name}"] for name in ("w1", "w2"))
            inner = hidden @ w1
            if spec.matrices_per_expert == 3:
                inner = inner * inner.sigmoid() * (hidden @ self.parameters[f"{prefix}.experts.{expert}.w3"])
            else:
                inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            mixed = mixed + weight[..., expert : expert + 1] * (inner @ w2)
        fraction = chosen.to(hidden.dtype).mean(1) * (spec.experts / spec.top_k)
        return mixed, (fraction * probability.mean(1)).sum(-1).mean()
