"""One optimizer step: batch and sequence, precision recipe, and routing of tokens to experts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Recipe:
    """Bytes kept of every parameter, and of one activation value.

    weight: what a forward reads; gradient: where gradients add up; master: a copy at higher precision, 0 where there
    is none; moments: both of Adam's. `gemm_dtype` names the peak rate that matrix products can reach.
    """

    name: str
    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    moment_bytes: int
    value_bytes: int
    gemm_dtype: str

    @property
    def state_bytes(self) -> int:
        """Bytes of one parameter that is sharded over nobody."""
        return self.weight_bytes + self.gradient_bytes + self.master_bytes + self.moment_bytes


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("float32", 4, 4, 0, 8, 4, "float32"),
        Recipe("float64", 8, 8, 0, 16, 8, "float64"),
        Recipe("bfloat16", 2, 2, 0, 4, 2, "bfloat16"),
        Recipe("mixed_16", 2, 2, 4, 8, 2, "bfloat16"),
        Recipe("mixed_18", 2, 4, 4, 8, 2, "bfloat16"),
        # FP8 products of weights that are kept in bf16 beside an FP8 copy and its transpose (Transformer Engine).
        Recipe("fp8_mixed", 4, 4, 4, 8, 2, "float8"),
        # DeepSeek-V3 (arXiv 2412.19437, section 3.3): FP8 weights, bf16 moments, fp32 master and gradients.
        Recipe("fp8_deepseek", 2, 4, 4, 4, 2, "float8"),
    )
}
"""`mixed_16` is the 16 B of Table III of arXiv 2605.05049; `mixed_18`, as Megatron-LM, adds gradients up in fp32."""

TRAINED = {"float32": RECIPES["float32"], "float64": RECIPES["float64"], "bfloat16": RECIPES["mixed_18"]}
"""What this project's executor keeps, by train.dtype: bf16 has too few digits to add up gradients or small updates."""


@dataclass(frozen=True)
class Routing:
    """How tokens are routed to experts, and how unevenly.

    mode: `dropless` (every copy is computed), `drop` (each expert takes at most capacity_factor times the mean and
    computes as many, filled up with padding) or `forced` (balanced by force, whatever the router says).
    imbalance: load of the busiest rank of an expert group over the mean, where no histogram is given; config key skew.
    histogram: share of all copies that each expert draws, as a run measured it.
    """

    mode: str = "dropless"
    capacity_factor: float = 1.0
    imbalance: float = 1.0
    histogram: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("dropless", "drop", "forced"):
            raise ValueError(f"routing.mode={self.mode!r}: must be dropless, drop or forced, for example dropless")
        if self.imbalance < 1 or self.capacity_factor <= 0:
            raise ValueError(
                f"routing: skew={self.imbalance} must be at least 1 and capacity_factor={self.capacity_factor} above "
                "0, for example skew=1.2 capacity_factor=1.25"
            )

    @property
    def kept(self) -> float:
        """Rows computed over rows routed: with a capacity every expert computes its capacity, padding included."""
        return self.capacity_factor if self.mode == "drop" else 1.0

    def load(self, ep: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Rows of the busiest rank over the mean, for `ep` ranks with adjacent experts, in the shape of `ep`.

        1 on one rank. From the histogram where there is one: ep * max over ranks of the sum of its experts' shares.
        """
        degrees = np.asarray(ep, dtype=np.int64)
        if self.mode != "dropless":
            return np.ones(degrees.shape)
        if not self.histogram:
            return np.where(degrees > 1, self.imbalance, 1.0)
        shares = np.asarray(self.histogram) / sum(self.histogram)
        loads = {degree: _busiest(shares, degree) for degree in np.unique(degrees).tolist()}
        return np.vectorize(loads.__getitem__, otypes=[np.float64])(degrees)


def _busiest(shares: npt.NDArray[np.float64], ranks: int) -> float:
    """Largest load over the mean when `ranks` hold adjacent experts; where they do not divide, that of one expert."""
    if len(shares) % ranks:
        return float(shares.max() * len(shares))
    return float(shares.reshape(ranks, -1).sum(axis=1).max() * ranks)


@dataclass(frozen=True)
class Workload:
    """Sequences of one step, their length in tokens, the bytes kept of everything, and the routing."""

    global_batch: int
    sequence: int
    recipe: Recipe = RECIPES["float32"]
    routing: Routing = field(default_factory=Routing)

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.sequence

    @property
    def bytes_per_value(self) -> int:
        """Bytes of one activation value."""
        return self.recipe.value_bytes
