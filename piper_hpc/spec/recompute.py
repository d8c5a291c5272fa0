"""Activation recomputation by part: `none`, `selective` (arXiv 2205.05198, section 5), `full`, or a sum of parts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ALIASES = {"none": "", "selective": "attention"}


@dataclass(frozen=True)
class Recompute:
    """1 for every part that is computed again, else 0; in a grid of layouts an array of both.

    full: whole layers, of which only the inputs are kept; attention: scores, softmax and their product with values;
    norm: norms' outputs; activation: the product of gate and up projection; mla_up: up projections of latent
    attention; moe: the whole MoE part of a layer, dispatch and combine included.
    """

    full: Any = 0
    attention: Any = 0
    norm: Any = 0
    activation: Any = 0
    mla_up: Any = 0
    moe: Any = 0

    @staticmethod
    def parse(text: str) -> Recompute:
        """From `none`, `selective` (= attention), `full`, or parts joined by `+`. ValueError for another word."""
        parts = [part for part in ALIASES.get(text, text).split("+") if part]
        known = [field.name for field in fields(Recompute)]
        for part in parts:
            if part not in known:
                raise ValueError(
                    f"recompute={text!r}: must be none, selective or some of {', '.join(known)} joined by +, "
                    "for example recompute=attention+norm"
                )
        return Recompute(**dict.fromkeys(parts, 1))
