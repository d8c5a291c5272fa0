"""What of the training state a rank holds, and what of it the rank writes, by logical name and rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.distributed as dist

from piper_hpc.parallel.parameters import Bucket, ParameterStore, Piece
from piper_hpc.train.optimizer import MOMENTS, Optimizer


@dataclass(frozen=True)
class Progress:
    """Where training stands: steps done, and samples of the data order used."""

    step: int
    samples: int


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of the tensor `name` of `shape` [rows, ...]: values [stop - start, ...]."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    values: torch.Tensor

    def copied(self) -> Part:
        """The same with a copy of the values, in host memory."""
        return replace(self, values=self.values.detach().to("cpu", copy=True))


def held(store: ParameterStore, optimizer: Optimizer) -> list[Part]:
    """All that this rank holds, as live views: master weights are `model.<name>`, Adam's moments
    `optimizer.<name>.exp_avg` and `.exp_avg_sq`, each expert apart; the state of routers is `model.<name>` too."""
    return [
        part
        for bucket, moments in zip(store.buckets, optimizer.moments, strict=True)
        for part in _parts(bucket.pieces, bucket, moments)
    ] + _states(store)


def owned(store: ParameterStore, optimizer: Optimizer) -> list[Part]:
    """Of `held` what this rank writes: with all ranks' parts, every row of every tensor once.

    Copies of a whole bucket share the work, tensor by tensor in turn.
    """
    dense = store.buckets[0].group
    return [
        part
        for bucket, moments in zip(store.buckets, optimizer.moments, strict=True)
        for part in _parts(_turn(bucket), bucket, moments)
    ] + (_states(store) if dense is None or dist.get_rank(dense) == 0 else [])


def _states(store: ParameterStore) -> list[Part]:
    return [
        Part(f"model.{name}", tuple(tensor.shape), 0, tensor.shape[0], tensor) for name, tensor in store.state.items()
    ]


def _turn(bucket: Bucket) -> list[Piece]:
    if bucket.sharded or bucket.group is None:
        return bucket.pieces
    return bucket.pieces[dist.get_rank(bucket.group) :: bucket.copies]


def _parts(pieces: Sequence[Piece], bucket: Bucket, moments: dict[str, torch.Tensor]) -> list[Part]:
    tensors = [("model.{}", bucket.master)] + [(f"optimizer.{{}}.{name}", moments[name]) for name in MOMENTS]
    return [
        Part(key.format(piece.name), piece.shape, piece.start, piece.stop, piece.of(flat))
        for piece, (key, flat) in product(pieces, tensors)
    ]
