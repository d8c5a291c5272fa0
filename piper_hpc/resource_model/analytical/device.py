"""Seconds of kernels on one accelerator, by a roofline (Williams, Waterman and Patterson, CACM 52(4), 2009).

Its two roofs are the peak rate and the memory bandwidth, each times the share of it that was measured or fitted (see
spec.Efficiency). Sizes are numbers, or arrays that broadcast: one layout, or a grid of them.
"""

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
    input_grad: Number = 0.0
    weight_grad: Number = 0.0

    @property
    def backward(self) -> Number:
        """Both halves of the backward."""
        return self.input_grad + self.weight_grad

    def __add__(self, other: Times) -> Times:
        return Times(
            self.forward + other.forward, self.input_grad + other.input_grad, self.weight_grad + other.weight_grad
        )

    def __mul__(self, factor: Number) -> Times:
        return Times(self.forward * factor, self.input_grad * factor, self.weight_grad * factor)

    def with_recompute(self, flag: Number) -> Times:
        """With the forward once more before the backward, where `flag` is 1 (0: unchanged)."""
        return Times(self.forward, self.input_grad + flag * self.forward, self.weight_grad)


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
        """Seconds of a kernel that only reads and writes `moved_bytes`: bytes / (bandwidth * share)."""
        return moved_bytes / (self.accelerator.memory_bytes_per_s * self.accelerator.efficiency.memory)

    def gemm_s(
        self,
        rows: Number,
        columns: Number,
        depth: Number,
        moved_bytes: Number,
        share: Number,
        groups: Number = 1.0,
        concurrent: Number | None = None,
    ) -> Number:
        """Seconds of `groups` products [rows, depth] x [depth, columns], `concurrent` of them at once (default: all).

        max(FLOPs / (share * peak) * waves * (1 + gemm_edge / depth), moved_bytes / bandwidth). waves: output tiles go
        to the compute units in whole waves; gemm_edge, fitted: a tile's first step along the depth is not overlapped.
        share: of the peak rate, 0 ... 1.
        """
        flops = 2.0 * groups * rows * columns * depth
        slower = self.waves(rows, columns, groups if concurrent is None else concurrent) * (
            1 + self.accelerator.efficiency.gemm_edge / depth
        )
        return np.maximum(flops * slower / (share * self.peak_flops), self.stream_s(moved_bytes))

    def waves(self, rows: Number, columns: Number, groups: Number = 1.0) -> Number:
        """Tile and wave quantization as a factor of at least 1: tiles that fill all waves over the tiles of work.

        groups products of [rows, columns] outputs in tiles of TILE, laid the better of two ways; 1 without
        compute_units. See NVIDIA's Matrix Multiplication Background guide.
        """
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
        """Seconds of [rows, inputs] x [inputs, outputs]; with `groups` weights, [rows / groups, inputs] through each.

        The backward has two products of the same FLOPs. That of the weights reads and writes the gradient's sum where
        accumulation is fused; else it writes a gradient of its own, which another kernel then adds. Gradients add up in
        recipe.gradient_bytes.
        """
        efficiency = self.accelerator.efficiency
        share = np.where(np.asarray(groups) > 1, efficiency.grouped_gemm, efficiency.gemm)
        share = share * self.accelerator.relative_share(self.recipe.gemm_dtype)
        value, weights = self.recipe.value_bytes, groups * inputs * outputs
        sums = 2 * weights * self.recipe.gradient_bytes
        moved = (rows * (inputs + outputs) + weights) * value
        updated = moved if not self.fused_accumulation else moved - weights * value + sums
        added_s = 0.0 if self.fused_accumulation else self.stream_s(weights * value + sums)
        each, concurrent = rows / groups, np.minimum(groups, STREAMS)
        cast_s, cast_back_s = self._cast_s(rows * inputs), self._cast_s(rows * outputs)
        return Times(
            forward=cast_s + self.gemm_s(each, outputs, inputs, moved, share, groups, concurrent),
            input_grad=cast_back_s + self.gemm_s(each, inputs, outputs, moved, share, groups, concurrent),
            weight_grad=self.gemm_s(inputs, outputs, each, updated, share, groups, concurrent) + added_s,
        )

    def _cast_s(self, values: Number) -> Number:
        """Making FP8 of `values`: they are read, and written twice, the second time transposed for the backward."""
        return self.stream_s(values * (self.recipe.value_bytes + 2)) if self.recipe.gemm_dtype == "float8" else 0.0

    def streamed(self, values: Number, forward: float, backward: float) -> Times:
        """Element-wise work: how often `values` are moved in forward and in backward."""
        moved = values * self.recipe.value_bytes
        return Times(self.stream_s(forward * moved), self.stream_s(backward * moved))
