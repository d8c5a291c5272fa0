"""The shapes of layers that are timed, and what a table says of each."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

from piper_hpc.spec import ModelSpec

DTYPES = ("float32", "bfloat16")
PARTS = ("experts", "block")
"""The MoE part of a layer (router, experts, weighted sum), and the whole layer with norms and attention."""
SLOW_SHARE = 0.8
GAIN, LEAST = 1.2, 0.95
"""The bar: where the other reaches less than SLOW_SHARE of the dense product, the geometric mean of how many times
faster this layer is; and the least of it anywhere."""
HEADS, HEAD_DIM = 8, 64


@dataclass(frozen=True)
class Shape:
    """One layer and its batch. tokens: of a micro-batch, in sequences of at most 512."""

    hidden: int
    expert_ffn: int
    experts: int
    top_k: int
    tokens: int

    @property
    def sequence(self) -> int:
        """Tokens of one sequence."""
        return min(512, self.tokens)

    @property
    def flops(self) -> float:
        """Of forward and backward of the experts alone: 3 * 2 rows n_mat d f."""
        return 18.0 * self.tokens * self.top_k * self.hidden * self.expert_ffn

    @property
    def spec(self) -> ModelSpec:
        """As a model of one layer; weights are not normalised, and there is no balancing loss in either layer."""
        return ModelSpec(
            "layer", layers=1, hidden=self.hidden, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM, experts=self.experts,
            top_k=self.top_k, expert_ffn=self.expert_ffn, vocab=64, qk_norm="head", rope_theta=1e6, router_aux_coef=0.0,
        )  # fmt: skip


SHAPES = (
    Shape(512, 1408, 8, 2, 1024),
    Shape(512, 352, 32, 8, 1024),
    Shape(512, 128, 64, 8, 1024),
    Shape(1024, 256, 64, 8, 512),
    Shape(256, 128, 128, 8, 2048),
    Shape(512, 128, 64, 8, 256),
)
"""Mixtral's proportions first, then finer experts, down to a few rows each."""


@dataclass(frozen=True)
class Timed:
    """Median seconds of forward and backward of one shape, of everything in turn in one run; our_products and
    their_products: share of matrix products in each layer's time, None where it was not profiled."""

    shape: Shape
    dtype: str
    part: str
    ours_s: float
    theirs_s: float
    dense_s: float
    our_products: float | None = None
    their_products: float | None = None

    @property
    def gain(self) -> float:
        """How many times faster than the other."""
        return self.theirs_s / self.ours_s

    @property
    def their_share(self) -> float:
        """Of the dense product's speed that the other reaches."""
        return self.dense_s / self.theirs_s

    @property
    def our_share(self) -> float:
        """Of the dense product's speed that this layer reaches."""
        return self.dense_s / self.ours_s


@dataclass(frozen=True)
class Verdict:
    """gain: geometric mean where the other is slow, None where it never is; least: of all points."""

    gain: float | None
    least: float

    @property
    def met(self) -> bool:
        """Whether both bars are."""
        return (self.gain is None or self.gain >= GAIN) and self.least >= LEAST


def judge(timed: list[Timed]) -> Verdict:
    """Over all points."""
    slow = [one.gain for one in timed if one.their_share < SLOW_SHARE]
    mean = exp(sum(map(log, slow)) / len(slow)) if slow else None
    return Verdict(mean, min(one.gain for one in timed))
