"""How rotary positions are stretched to a longer context than a model was first trained on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from piper_hpc.spec.problem import Problem, SpecError

KINDS = ("yarn", "llama3", "linear", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """The `rope_scaling` of a released config.json; angles per position are divided by up to `factor`.

    kind: `yarn` (arXiv 2309.00071: frequencies between beta_fast and beta_slow turns in original_positions are blended,
    in whole dimensions where `truncate`), `llama3` (Llama 3.1: blended between low_freq_factor and high_freq_factor
    turns in original_positions), `linear` (arXiv 2306.15595) or `longrope` (planned alone). mscale, mscale_all_dim:
    YaRN's factors of cosine and sine, 0 where a file has none; DeepSeek's latent attention takes mscale_all_dim into
    its scores too. attention_factor: of cosine and sine, 0 where it follows from the others. Raises SpecError.
    """

    kind: str
    factor: float
    original_positions: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if problems := list(self._broken()):
            raise SpecError(*problems)

    def _broken(self) -> Iterator[Problem]:
        prefix = "model.rope_scaling"
        if self.kind not in KINDS:
            rule = f"must be one of {', '.join(KINDS)}"
            yield Problem(f"{prefix}.kind", self.kind, rule, f"{prefix}.kind={KINDS[0]}")
        if not self.factor >= 1:
            yield Problem(f"{prefix}.factor", self.factor, "must be at least 1", f"{prefix}.factor=4")
        if self.kind in ("yarn", "llama3") and not self.original_positions > 0:
            rule = "must be given: the context that the frequencies were first trained on"
            yield Problem(
                f"{prefix}.original_positions", self.original_positions, rule, f"{prefix}.original_positions=4096"
            )
        if not self.high_freq_factor >= self.low_freq_factor:
            rule = f"must be at least low_freq_factor = {self.low_freq_factor}"
            yield Problem(f"{prefix}.high_freq_factor", self.high_freq_factor, rule, f"{prefix}.high_freq_factor=4")

    @property
    def rotation_factor(self) -> float:
        """What cosine and sine are multiplied by (arXiv 2309.00071 Eq 22; DeepSeek-V2 divides two such factors)."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def score_factor(self) -> float:
        """What latent attention's scores are multiplied by (DeepSeek-V2, arXiv 2405.04434 section 3.1.4)."""
        return self._temperature(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _temperature(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0
