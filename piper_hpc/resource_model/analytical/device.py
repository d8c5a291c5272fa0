"""Seconds of kernels on one accelerator: a roofline whose two roofs are the shares that were measured or fitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import Accelerator, Recipe

STREAMS = 4
"""Products of a group that Transformer Engine runs side by side, each a kernel of its own."""

TILE = (128, 256)
"""Output tile of the large matrix products of cuBLAS, hipBLASLt and CUTLASS (the guides' most efficient size)."""


@dataclass(frozen=True)
class Times:
    """Seconds of one module for one micro-batch: forward, gradients of inputs, gradients of weights."""

    forward: Number = 0.0
    input: Number = 0.0
    weight: Number = 0.0

    @property
    def backward(self) -> Number:
        """Both halves of the backward."""
        return self.input + self.weight

    def __add__(self, other: Times) -> Times:
        return Times(self.forward + other.forward, self.input + other.input, self.weight + other.weight)

    def __mul__(self, factor: Number) -> Times:
        return Times(self.forward * factor, self.input * factor, self.weight * factor)

    def recomputed(self, flag: Number) -> Times:
        """With the forward once more before the backward, where `flag` is 1."""
        return Times(self.forward, self.input + flag * self.forward, self.weight)


@dataclass(frozen=True)
class Device:
    """Prices operations of one precision recipe on one accelerator; sizes may be arrays."""

    accelerator: Accelerator
    recipe: Recipe
    fused_accumulation: bool = True

    @property
    def peak_flops(self) -> float:
        """Peak rate of the recipe's matrix products, FLOP/s."""
        return self.accelerator.peak_flops[self.recipe.gemm_dtype]

    def stream_s(self, moved_bytes: Number) -> Number:
        """A kernel that only reads and writes `moved_bytes`."""
        return moved_bytes / (self.accelerator.memory_bytes_per_s * self.accelerator.efficiency.memory)

    def gemm_s(
        self,
        rows: Number,
        columns: Number,
        depth: Number,
        moved_bytes: Number,
        share: Number,
        groups: Number = 1.0,
        beside: Number | None = None,
    ) -> Number:
        """`groups` products [rows, depth] x [depth, columns], `beside` of them at once; or the speed of what they move.

        All run in one kernel where `beside` is not given. Output tiles go to the compute units in whole waves, and a
        tile's first step along the depth is not overlapped.
        """
        flops = 2.0 * groups * rows * columns * depth
        slower = self.waves(rows, columns, groups if beside is None else beside) * (
            1 + self.accelerator.efficiency.gemm_edge / depth
        )
        return np.maximum(flops * slower / (share * self.peak_flops), self.stream_s(moved_bytes))

    def waves(self, rows: Number, columns: Number, groups: Number = 1.0) -> Number:
        """Slots that the compute units offer over tiles of work, at least 1, for the better way to lay the tile."""
        units = self.accelerator.compute_units
        if not units:
            return 1.0
        ways = []
        for high, wide in ((TILE[0], TILE[1]), (TILE[1], TILE[0])):
            tiles = groups * np.ceil(rows / high) * np.ceil(columns / wide)
            work = groups * rows * columns / (high * wide)
            ways.append(np.ceil(tiles / units) * units / work)
        return np.minimum(*ways)

    def linear(self, rows: Number, inputs: Number, outputs: Number, groups: Number = 1.0) -> Times:
        """A projection of `rows` in all through `groups` weights of [inputs, outputs]; gradients add up in their dtype.

        Its backward has two products. That of the weights reads and writes the gradient's sum where accumulation is
        fused; else it writes a gradient of its own, which another kernel then adds.
        """
        efficiency = self.accelerator.efficiency
        share = np.where(np.asarray(groups) > 1, efficiency.grouped_gemm, efficiency.gemm)
        share = share * self.accelerator.relative_share(self.recipe.gemm_dtype)
        value, weights = self.recipe.value_bytes, groups * inputs * outputs
        sums = 2 * weights * self.recipe.gradient_bytes
        moved = (rows * (inputs + outputs) + weights) * value
        updated = moved if not self.fused_accumulation else moved - weights * value + sums
        added_s = 0.0 if self.fused_accumulation else self.stream_s(weights * value + sums)
        each, beside = rows / groups, np.minimum(groups, STREAMS)
        cast_s, cast_back_s = self._cast_s(rows * inputs), self._cast_s(rows * outputs)
        return Times(
            forward=cast_s + self.gemm_s(each, outputs, inputs, moved, share, groups, beside),
            input=cast_back_s + self.gemm_s(each, inputs, outputs, moved, share, groups, beside),
            weight=self.gemm_s(inputs, outputs, each, updated, share, groups, beside) + added_s,
        )

    def _cast_s(self, values: Number) -> Number:
        """Making FP8 of `values`: they are read, and written twice, the second time transposed for the backward."""
        return self.stream_s(values * (self.recipe.value_bytes + 2)) if self.recipe.gemm_dtype == "float8" else 0.0

    def streamed(self, values: Number, forward: float, backward: float) -> Times:
        """Element-wise work: how often `values` are moved in forward and in backward."""
        moved = values * self.recipe.value_bytes
        return Times(self.stream_s(forward * moved), self.stream_s(backward * moved))
