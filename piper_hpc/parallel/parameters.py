"""Parameters of one rank in contiguous buckets: working weights, gradients, master weights, and who else holds them.

Working weights have the compute type. Gradients add up in float32 (float64 for float64) over micro-batches and ranks,
and the optimizer works on a master copy in that type; where it is the compute type, the weights are the master.

With ZeRO-1 (arXiv 1910.02054) the copies of a bucket share its optimizer: every logical tensor, an expert's for
itself, is cut along its first dimension into one slice a copy, so that an expert can move to another rank with its own
slices alone. Gradient slices travel by all-to-all and are added where they arrive: gloo's reduce_scatter sends as much
as its all_reduce, and a sum in rank order is the same on every back end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from piper_hpc.model import Stage
from piper_hpc.model.names import ExpertsByLayer, is_expert, layer_of, logical_names
from piper_hpc.parallel.groups import Groups
from piper_hpc.spec.layout import Layout


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of one logical tensor of `shape` [rows, ...], at `offset` of a flat master."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This piece of a flat master, or of moments that lie like it, as a view [stop - start, ...]."""
        rows = self.stop - self.start
        return flat[self.offset : self.offset + rows * _width(self.shape)].view(rows, *self.shape[1:])


@dataclass(frozen=True)
class Slot:
    """One parameter of a bucket: a stack of logical tensors (`names`, one but for experts) of `shape` [rows, ...] each.

    name: the parameter's; copies: how many slices each of them is cut into, 1 where it stays whole.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    shape: tuple[int, ...]
    copies: int

    @staticmethod
    def of(name: str, parameter: nn.Parameter, experts: ExpertsByLayer, copies: int) -> Slot:
        """experts: those of the rank."""
        stacked = is_expert(name)
        shape = parameter.shape[1:] if stacked else parameter.shape
        return Slot(name, tuple(logical_names(name, experts)), parameter, tuple(shape), copies)

    @property
    def layer(self) -> int | None:
        """The global layer whose experts these are; None where they are no experts."""
        return layer_of(self.name) if is_expert(self.name) else None

    @property
    def is_matrix(self) -> bool:
        """Whether each logical tensor is one: norms, biases and sinks are not, and do not decay."""
        return len(self.shape) > 1

    @property
    def slice_rows(self) -> int:
        """Rows of one slice; the last slices may hold fewer, and are filled up with zeros."""
        return -(-self.shape[0] // self.copies)

    @property
    def slice_size(self) -> int:
        """Elements of one slice of every logical tensor, in a master."""
        return len(self.names) * self.slice_rows * _width(self.shape)

    def slices(self, flat: torch.Tensor) -> torch.Tensor:
        """The parameter's elements in order, [numel], as [copies, slice_size]."""
        rows, width = self.slice_rows, _width(self.shape)
        stacked = flat.view(len(self.names), self.shape[0], width)
        filled = F.pad(stacked, (0, 0, 0, self.copies * rows - self.shape[0]))
        return filled.view(len(self.names), self.copies, rows * width).transpose(0, 1).flatten(1)

    def joined(self, slices: torch.Tensor) -> torch.Tensor:
        """The inverse of `slices`: [copies, slice_size] -> [numel]."""
        rows, width = self.slice_rows, _width(self.shape)
        stacked = slices.view(self.copies, len(self.names), rows * width).transpose(0, 1)
        return stacked.reshape(len(self.names), self.copies * rows, width)[:, : self.shape[0]].flatten()

    def pieces(self, offset: int, copy: int) -> Iterator[Piece]:
        """What slice `copy` holds of each logical tensor; it lies at `offset` of the master."""
        rows = self.slice_rows
        start, stop = min(copy * rows, self.shape[0]), min((copy + 1) * rows, self.shape[0])
        for index, name in enumerate(self.names):
            if start < stop:
                yield Piece(name, self.shape, start, stop, offset + index * rows * _width(self.shape))


@dataclass(frozen=True)
class SquaredNorm:
    """One rank's share of the squared global norm; the shares of all ranks add up to it.

    dense: float64 scalar; experts: float64 [layers, experts, cuts], by logical expert, where an element gets parts from
    two ranks at most: whatever order ranks are added in, no bit of the sum depends on which of them held the expert.
    cuts: parts of an expert on ranks of their own, 1 where there are two of them or one.
    """

    dense: torch.Tensor
    experts: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The whole share, a float64 scalar."""
        return self.dense + self.experts.sum()


class Bucket:
    """Parameters of one chunk of layers that the same ranks hold copies of.

    weights [size], compute type, and gradients [size], master's type: parameters and their `.grad` are views of them.
    master: what this rank's optimizer steps, [size], or [size / copies] with ZeRO-1, with `reduced`, its gradient, in
    the same shape. Matrices come first: weight decay applies to the first `decayed` elements of the master alone.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        *,
        group: dist.ProcessGroup | None,
        zero: int,
        experts: ExpertsByLayer,
        in_slices: bool = False,
    ) -> None:
        """group: the ranks with copies; experts: those of the rank.

        in_slices: add gradients up in slices of every logical tensor without ZeRO-1 too, so that no bit depends on
        where a tensor lies: an all-reduce adds in an order that changes along its buffer. Of two copies none does.
        """
        self.group = group
        self.copies = 1 if group is None else dist.get_world_size(group)
        self.replica = 0 if group is None else dist.get_rank(group)
        self.sharded = zero > 0 and self.copies > 1
        self.in_slices = in_slices and self.copies > 2 and not self.sharded
        self.copy = self.replica if self.sharded else 0
        slots = [Slot.of(name, each, experts, self.copies if self.sharded else 1) for name, each in named]
        self.slots = sorted(slots, key=lambda slot: not slot.is_matrix)
        self.layers = list(dict.fromkeys(slot.layer for slot in self.slots if slot.layer is not None))
        compute = self.slots[0].parameter.dtype
        wide = torch.float64 if compute == torch.float64 else torch.float32
        self.weights = torch.cat([slot.parameter.detach().flatten() for slot in self.slots])
        self.gradients = torch.zeros_like(self.weights, dtype=wide)
        self._point_parameters_here()
        # A slice is a copy of its own: what an all-gather reads must not be what it writes.
        self.master = (
            self._slices(self.weights)[self.copy].to(wide, copy=True) if self.sharded else self.weights.to(wide)
        )
        self.reduced = torch.zeros_like(self.master) if self.sharded else self.gradients
        self.decayed = sum(slot.slice_size for slot in self.slots if slot.is_matrix)
        self._work: dist.Work | None = None
        self._received: torch.Tensor | None = None

    @property
    def pieces(self) -> list[Piece]:
        """What the master of this rank holds of every logical tensor; of moments the same."""
        offsets = accumulate((slot.slice_size for slot in self.slots), initial=0)
        return [piece for slot, at in zip(self.slots, offsets, strict=False) for piece in slot.pieces(at, self.copy)]

    def relabel(self, experts: ExpertsByLayer) -> None:
        """From now on the stacks hold these experts; what is in them is the caller's."""
        self.slots = [replace(slot, names=tuple(logical_names(slot.name, experts))) for slot in self.slots]

    def start_reduction(self) -> None:
        """Post the sum of the gradients over the copies. Collective over the group, which does it in one order."""
        if self.group is None:
            return
        if not self.sharded and not self.in_slices:
            self._work = dist.all_reduce(self.gradients, group=self.group, async_op=True)
            return
        outgoing = self._slices(self.gradients)
        self._received = torch.empty_like(outgoing)
        self._work = dist.all_to_all_single(self._received, outgoing, group=self.group, async_op=True)

    def finish_reduction(self) -> None:
        """Afterwards `reduced` is the sum over all copies of this rank's part; equal parts are equal bit for bit."""
        if self._work is not None:
            self._work.wait()
        if self._received is not None and self.in_slices:
            self._gather(self._received.sum(0), self.gradients)
        elif self._received is not None:
            torch.sum(self._received, 0, out=self.reduced)
        self._work = self._received = None

    def squared_norm(self) -> torch.Tensor:
        """This rank's share of the bucket's squared norm, a float64 scalar: a parameter counts once over all copies."""
        exact = torch.linalg.vector_norm(self.reduced, dtype=self.reduced.dtype).double().square()
        return exact if self.sharded else exact / self.copies

    def squared_norm_by_expert(self) -> torch.Tensor:
        """Of a bucket of experts the squared norm of what this rank holds of each, float64 [layers, experts_per_rank]:
        each by itself, so that its place in the bucket changes no bit."""
        parts = self.reduced.split([slot.slice_size for slot in self.slots])
        norms = torch.stack(
            [
                torch.linalg.vector_norm(part.view(len(slot.names), -1), dim=1, dtype=part.dtype)
                for slot, part in zip(self.slots, parts, strict=True)
            ]
        )
        return norms.double().square().view(len(self.layers), -1, norms.shape[1]).sum(1)

    def publish(self) -> None:
        """Make the weights those of the master, on all copies. Collective over the group with ZeRO-1."""
        if self.sharded:
            self._gather(self.master.to(self.weights.dtype), self.weights)
        elif self.master is not self.weights:
            self.weights.copy_(self.master)

    def non_finite(self) -> list[str]:
        """Logical tensors with an infinity or no number in the reduced gradient, as far as this rank holds it."""
        return [piece.name for piece in self.pieces if not piece.of(self.reduced).isfinite().all()]

    def _slices(self, flat: torch.Tensor) -> torch.Tensor:
        """All parameters' elements [size] as [copies, size / copies], one row for each copy's master."""
        parts = flat.split([slot.parameter.numel() for slot in self.slots])
        return torch.cat([slot.slices(part) for slot, part in zip(self._cut, parts, strict=True)], dim=1)

    def _gather(self, own: torch.Tensor, out: torch.Tensor) -> None:
        """All copies' slices [size / copies], of which `own` is this one's, joined into `out` [size]. Collective."""
        gathered = own.new_empty(self.copies, len(own))
        dist.all_gather(list(gathered.unbind()), own, group=self.group)
        parts = gathered.split([slot.slice_size for slot in self._cut], dim=1)
        torch.cat([slot.joined(part) for slot, part in zip(self._cut, parts, strict=True)], out=out)

    @property
    def _cut(self) -> list[Slot]:
        """The parameters, cut into a slice for each copy."""
        return [replace(slot, copies=self.copies) for slot in self.slots]

    def _point_parameters_here(self) -> None:
        sizes = [slot.parameter.numel() for slot in self.slots]
        for slot, weight, gradient in zip(
            self.slots, self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            parameter = slot.parameter
            parameter.data = weight.view_as(parameter)
            if parameter.dtype != gradient.dtype:
                parameter.grad_dtype = gradient.dtype
            parameter.grad = gradient.view_as(parameter)


class ParameterStore:
    """All buckets of a rank: of each of its chunks the dense parameters and the experts.

    Dense parameters are replicated over the whole stage, experts over the replicas. The loss is a share of the step's
    loss (sum over tokens / global tokens), so both are summed, once, after a chunk's last micro-batch.
    """

    def __init__(
        self,
        chunks: Sequence[Stage],
        groups: Groups,
        layout: Layout,
        experts: ExpertsByLayer,
        *,
        experts_move: bool = False,
    ) -> None:
        """experts: those of this rank; experts_move: whether they may become others, see `relabel`."""
        self.experts = experts
        self.by_chunk = [
            [
                Bucket(named, group=group, zero=layout.zero, experts=experts, in_slices=move)
                for named, group, move in (
                    ([each for each in chunk.named_parameters() if not is_expert(each[0])], groups.stage, False),
                    ([each for each in chunk.named_parameters() if is_expert(each[0])], groups.replica, experts_move),
                )
                if named  # a chunk of dense layers alone has no experts
            ]
            for chunk in chunks
        ]
        self.state = {name: tensor for chunk in chunks for name, tensor in chunk.state().items()}
        """What training changes beside parameters, by global name, on every rank of its stage alike."""
        self._experts = layout.ep * len(experts[0])
        self._cuts = layout.dp if layout.zero and layout.dp > 2 else 1

    @property
    def buckets(self) -> list[Bucket]:
        """Of all chunks, in order."""
        return [bucket for of_chunk in self.by_chunk for bucket in of_chunk]

    def zero(self) -> None:
        """Forget the gradients of the step before."""
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def start_reduction(self, chunk: int) -> None:
        """Post the reduction of one chunk, whose last gradient is there. Collective over its stage."""
        for bucket in self.by_chunk[chunk]:
            bucket.start_reduction()

    def finish_reduction(self) -> None:
        """Wait for all that was posted."""
        for bucket in self.buckets:
            bucket.finish_reduction()

    @property
    def expert_buckets(self) -> list[Bucket]:
        """Those of experts, by chunk."""
        return [bucket for bucket in self.buckets if bucket.layers]

    def relabel(self, experts: ExpertsByLayer) -> None:
        """From now on the stacks hold these experts; what is in them is the caller's."""
        self.experts = experts
        for bucket in self.expert_buckets:
            bucket.relabel(experts)

    def squared_norm(self) -> SquaredNorm:
        """This rank's share of the squared global norm."""
        dense = torch.stack([bucket.squared_norm() for bucket in self.buckets if not bucket.layers]).sum()
        shares = dense.new_zeros(len(self.experts) * self._experts, self._cuts)
        for bucket in self.expert_buckets:
            if bucket.replica and not bucket.sharded:
                continue  # copies have equal bits: the first one's count
            held = [layer * self._experts + expert for layer in bucket.layers for expert in self.experts[layer]]
            index = torch.tensor(held, device=shares.device)
            column = bucket.replica if shares.shape[1] > 1 else 0
            shares[:, column].index_copy_(0, index, bucket.squared_norm_by_expert().flatten())
        return SquaredNorm(dense, shares.view(len(self.experts), self._experts, -1))

    def clip(self, norm: float, max_norm: float) -> None:
        """Multiply all gradients by min(1, max_norm / (norm + 1e-6)), as torch's `clip_grad_norm_` does.

        norm: the global L2 norm before clipping, in the units of the gradients, as is max_norm.
        """
        scale = min(1.0, max_norm / (norm + 1e-6))
        for bucket in self.buckets:
            bucket.reduced.mul_(scale)

    def publish(self) -> None:
        """Make all weights those of their masters."""
        for bucket in self.buckets:
            bucket.publish()


def _width(shape: Sequence[int]) -> int:
    """Elements of one row of a tensor."""
    return torch.Size(shape[1:]).numel()
