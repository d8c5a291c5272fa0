"""Parameters in buckets: ZeRO-1 slices cover every tensor once, travel and come back whole, and sum what all hold."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from piper_hpc.parallel.parameters import Bucket, Piece, Slot
from tests.processes import run_ranks

EXPERTS = "layers.3.experts.w1"


def held(experts: Sequence[int]) -> list[Sequence[int]]:
    """A rank's experts of the layer of `EXPERTS`, and none of those before it."""
    return [(), (), (), experts]


def slot(copies: int, logical: int, rows: int, width: int) -> Slot:
    """A stack of `logical` experts [rows, width]."""
    stack = nn.Parameter(torch.arange(logical * rows * width, dtype=torch.float32).view(logical, rows, width))
    return Slot.of(EXPERTS, stack, held(range(10, 10 + logical)), copies)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 9), st.integers(1, 3))


@given(shapes)
def test_slices_join_to_what_they_were_cut_from(shape: tuple[int, int, int, int]) -> None:
    cut = slot(*shape)
    flat = cut.parameter.detach().flatten()
    slices = cut.slices(flat)
    assert slices.shape == (cut.copies, cut.slice_size)
    assert torch.equal(cut.joined(slices), flat)


@given(shapes)
def test_pieces_of_all_copies_are_every_row_of_every_expert_once(shape: tuple[int, int, int, int]) -> None:
    cut = slot(*shape)
    stack = cut.parameter.detach()
    slices = cut.slices(stack.flatten())
    rows: dict[str, list[int]] = {name: [] for name in cut.names}
    for copy in range(cut.copies):
        for piece in cut.pieces(0, copy):
            expert = cut.names.index(piece.name)
            assert torch.equal(piece.of(slices[copy]), stack[expert, piece.start : piece.stop])
            rows[piece.name] += range(piece.start, piece.stop)
    assert all(found == list(range(stack.shape[1])) for found in rows.values())


def test_a_whole_bucket_is_its_own_master_in_float32_and_apart_in_bfloat16() -> None:
    for dtype, same in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        weight, gain = nn.Parameter(torch.ones(4, 3, dtype=dtype)), nn.Parameter(torch.ones(3, dtype=dtype))
        bucket = Bucket([("gain", gain), ("weight", weight)], group=None, zero=1, experts=())
        assert (bucket.master.data_ptr() == bucket.weights.data_ptr()) is same
        assert (bucket.decayed, len(bucket.master)) == (12, 15)
        assert bucket.pieces == [Piece("weight", (4, 3), 0, 4, 0), Piece("gain", (3,), 0, 3, 12)]
        weight.grad.fill_(2.0)
        assert float(bucket.gradients.sum()) == 24.0


def summed(zero: int, dtype: torch.dtype) -> dict[str, object]:
    """On one rank: gradients of its own, reduced; the master moved by them and published."""
    rank, experts = dist.get_rank(), held((4, 7))
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(5, 4, generator=generator).to(dtype))
    stack = nn.Parameter(torch.randn(2, 3, 4, generator=generator).to(dtype))
    gain = nn.Parameter(torch.randn(6, generator=generator).to(dtype))
    named = [("norm.weight", gain), ("head.weight", matrix), (EXPERTS, stack)]
    bucket = Bucket(named, group=dist.group.WORLD, zero=zero, experts=experts)
    for _, parameter in named:
        parameter.grad.copy_(parameter.detach().sin() * (rank + 1))
    bucket.start_reduction()
    bucket.finish_reduction()
    norm = bucket.squared_norm()
    dist.all_reduce(norm)
    bucket.master.sub_(bucket.reduced)
    bucket.publish()
    return {
        "weights": [parameter.detach().clone() for _, parameter in named],
        "norm": float(norm) ** 0.5,
        "master": len(bucket.master),
        "pieces": {(piece.name, piece.start): piece.of(bucket.master).clone() for piece in bucket.pieces},
    }


@pytest.mark.processes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_end_with_the_weights_of_whole_buckets(dtype: torch.dtype) -> None:
    ranks = 4
    whole, sharded = (run_ranks(ranks, summed, zero, dtype) for zero in (0, 1))
    for one, other in zip(whole, sharded, strict=True):
        for a, b, copy in zip(one["weights"], other["weights"], sharded[0]["weights"], strict=True):
            assert torch.allclose(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-2)  # summed in another order
            assert torch.equal(b, copy), "copies differ"
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-6)
        assert (one["master"], other["master"]) == (50, (2 * 4 + 2 * 1 * 4) + 2)  # rows of 5, 3 and 6 over four
    names = {name for one in sharded for name, _ in one["pieces"]}
    assert names == {"norm.weight", "head.weight", "layers.3.experts.4.w1", "layers.3.experts.7.w1"}


def with_a_nan() -> list[str]:
    """What rank 1's gradient of one expert makes non-finite, on this rank."""
    stack, gain = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(6))
    bucket = Bucket([(EXPERTS, stack), ("norm.weight", gain)], group=dist.group.WORLD, zero=1, experts=held((4, 7)))
    if dist.get_rank() == 1:
        stack.grad[1, 2] = torch.inf
    bucket.start_reduction()
    bucket.finish_reduction()
    return bucket.non_finite()


@pytest.mark.processes
def test_what_is_not_finite_is_named_by_who_holds_it() -> None:
    assert run_ranks(2, with_a_nan) == [[], ["layers.3.experts.7.w1"]]
