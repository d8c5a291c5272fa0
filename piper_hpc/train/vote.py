"""The one reduction that ends a step: the gradients' norm, whether all is finite, who asks to save or to stop, and
experts' tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from piper_hpc.parallel.parameters import SquaredNorm


@dataclass(frozen=True)
class Vote:
    """What all ranks know of the step, the same on each.

    grad_norm: global L2 norm before clipping; finite: whether every gradient is; stop, save: whether a rank asks to
    end, or for a checkpoint, after this step; routed: int64 [samples, layers, experts], choices of each expert in the
    micro-batches that are counted.
    """

    grad_norm: float
    finite: bool
    stop: bool
    routed: torch.Tensor
    save: bool = False


def end_of_step(
    squares: SquaredNorm, routed: torch.Tensor, *, stop: bool, group: dist.ProcessGroup | None, save: bool = False
) -> Vote:
    """Add up every rank's part in one all-reduce. Collective over `group`; the host waits for it.

    squares: this rank's share of the squared norm; routed: int64 [samples, layers, experts], what this rank routed, 0
    in layers that it does not hold. Counts are exact up to 2^53.
    """
    finite = squares.dense.isfinite() & squares.experts.isfinite().all()
    parts = (
        torch.where(finite, squares.dense, 0.0).view(1),
        (~finite).double().view(1),
        squares.dense.new_full((1,), float(stop)),
        squares.dense.new_full((1,), float(save)),
        torch.where(finite, squares.experts, 0.0).flatten(),
        routed.double().flatten(),
    )
    ballot = torch.cat(parts)
    if group is not None:
        dist.all_reduce(ballot, group=group)
    head, of_experts, counts = ballot.split([4, squares.experts.numel(), routed.numel()])
    dense, broken, stops, saves = head.tolist()
    norm = (dense + float(of_experts.sum())) ** 0.5
    return Vote(norm, not broken, bool(stops), counts.long().view_as(routed), bool(saves))


class NonFiniteError(ArithmeticError):
    """A gradient is infinite or not a number; the message names step, ranks and tensors."""

    failure_class = "numerical"


def non_finite_error(step: int, names: list[str], group: dist.ProcessGroup | None) -> NonFiniteError:
    """What to raise, or to record, on every rank. names: tensors of this rank that are not finite. Collective.

    Gradients are summed over copies by then, so all ranks that hold a copy of a tensor name it.
    """
    found: list[list[str]] = [names]
    if group is not None:
        found = [[] for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(found, names, group=group)
    holders: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(found):
        for name in of_rank:
            holders.setdefault(name, []).append(rank)
    first = ", ".join(f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in list(holders.items())[:3])
    more = f" and {len(holders) - 3} more" if len(holders) > 3 else ""
    return NonFiniteError(
        f"step {step}: the gradient is not finite of {first or 'no tensor alone: the norm overflows'}{more}"
    )
