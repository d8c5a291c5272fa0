"""The flat dispatcher against a plain loop, at uneven loads; its plan and the number of its exchanges."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.flat_plan import inverse, plan_flat
from piper_hpc.spec.expert_placement import ExpertPlacement
from tests.processes import run_ranks

EXPERTS, TOKENS, TOP_K, HIDDEN = 8, 12, 2, 5
PERMUTED = ExpertPlacement(3, (1, 0, 3, 2, 0, 1, 2, 3), (1, 0, 0, 1, 1, 0, 0, 1))


def chosen(load: str, rank: int) -> torch.Tensor:
    """expert_ids [tokens, top_k], distinct within a token. Loads: even, hot (all choose expert 3 first), partial
    (ranks above 1 have no tokens at all), skewed (experts 0 and 1 only, so some ranks receive nothing)."""
    generator = torch.Generator().manual_seed(rank)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    if load == "hot":
        others = ids[:, 1]
        ids = torch.stack((torch.full_like(others, 3), torch.where(others == 3, 4, others)), dim=1)
    if load == "skewed":
        ids = torch.tensor([[0, 1]]).expand(TOKENS, TOP_K).contiguous()
    return ids[:0] if load == "partial" and rank > 1 else ids


def scale_of(expert: int) -> float:
    return 1.0 + expert


def check_exchange(load: str, placement: ExpertPlacement) -> dict[str, object]:
    """One rank: experts that multiply by `scale_of`; compares outputs and gradients with a loop over tokens."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD if ranks > 1 else None
    ids = chosen(load, rank)
    generator = torch.Generator().manual_seed(100 + rank)
    tokens = torch.randn(len(ids), HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(len(ids), TOP_K, generator=generator, dtype=torch.float64, requires_grad=True)
    dispatcher = FlatDispatcher(group)
    begun, handle = dispatcher.dispatch(tokens, ids, weights, placement)
    rows = handle.rows(begun)
    assert int(handle.offsets[-1]) == len(rows)
    local = placement.experts_of(rank)
    sizes = torch.diff(handle.offsets, prepend=torch.zeros(1, dtype=torch.int32))
    scale = torch.tensor([scale_of(expert) for expert in local], dtype=torch.float64).repeat_interleave(sizes)
    combined = dispatcher.combine(rows * scale[:, None], handle)
    factor = torch.arange(HIDDEN, dtype=torch.float64)
    (combined * factor).sum().backward()
    scales = torch.tensor([scale_of(expert) for expert in range(EXPERTS)], dtype=torch.float64)[ids]
    expected = (weights * scales).sum(1, keepdim=True) * tokens
    torch.testing.assert_close(combined, expected)
    torch.testing.assert_close(tokens.grad, (weights * scales).sum(1, keepdim=True) * factor)
    torch.testing.assert_close(weights.grad, scales * (tokens * factor).sum(1, keepdim=True))
    return {"sizes": dict(zip(local, sizes.tolist(), strict=True)), "sent": ids.flatten().tolist()}


@pytest.mark.processes
@pytest.mark.parametrize("placement", [ExpertPlacement.linear(EXPERTS, 4), PERMUTED], ids=["linear", "permuted"])
@pytest.mark.parametrize("load", ["even", "hot", "partial", "skewed"])
def test_tokens_reach_their_experts_and_return(load: str, placement: ExpertPlacement) -> None:
    ranks = run_ranks(4, check_exchange, load, placement)
    sent = [expert for rank in ranks for expert in rank["sent"]]
    delivered = {expert: size for rank in ranks for expert, size in rank["sizes"].items()}
    assert delivered == {expert: sent.count(expert) for expert in range(EXPERTS)}


@pytest.mark.processes
def test_group_of_one_needs_no_exchange() -> None:
    run_ranks(1, check_exchange, "hot", ExpertPlacement.linear(EXPERTS, 1))


def count_exchanges() -> tuple[list[str], list[str]]:
    """Types of what `all_to_all_single` carries, in forward and in backward."""
    carried: list[str] = []
    original = dist.all_to_all_single

    def counting(output: torch.Tensor, *args: object, **kwargs: object) -> object:
        carried.append(str(output.dtype))
        return original(output, *args, **kwargs)

    dist.all_to_all_single = counting
    try:
        tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, requires_grad=True)
        dispatcher = FlatDispatcher(dist.group.WORLD)
        begun, handle = dispatcher.dispatch(
            tokens, chosen("even", dist.get_rank()), weights, ExpertPlacement.linear(EXPERTS, dist.get_world_size())
        )
        rows = handle.rows(begun)
        result = dispatcher.combine(rows, handle).sum()
        forward = list(carried)
        result.backward()
        return forward, carried[len(forward) :]
    finally:
        dist.all_to_all_single = original


@pytest.mark.processes
def test_two_exchanges_of_rows_each_way_and_one_of_counts() -> None:
    for forward, backward in run_ranks(2, count_exchanges):
        assert forward == ["torch.int64", "torch.float32", "torch.float32"]
        assert backward == ["torch.float32", "torch.float32"]


def test_plan_sorts_assignments_by_position_and_keeps_token_order() -> None:
    ids = torch.tensor([[2, 0], [1, 2], [0, 3]])
    plan = plan_flat(ids, torch.tensor([0, 1, 2, 3]), 1, None)
    assert plan.order.tolist() == [1, 4, 2, 0, 3, 5]
    assert plan.order[plan.inverse_order].tolist() == list(range(6))
    assert plan.offsets.tolist() == [2, 3, 5, 6] and plan.offsets.dtype == torch.int32


def test_inverse_of_a_permutation() -> None:
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert inverse(order)[order].tolist() == list(range(50))


@pytest.mark.parametrize(
    ("ranks", "slots"), [((0, 0, 1, 1), (0, 0, 0, 1)), ((0, 0, 0, 1), (0, 1, 2, 0)), ((0, 0, 2, 2), (0, 1, 0, 1))]
)
def test_placement_with_a_hole_or_a_clash_is_refused(ranks: tuple[int, ...], slots: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        ExpertPlacement(0, ranks, slots)


def test_linear_placement_needs_a_divisor() -> None:
    assert ExpertPlacement.linear(8, 4).experts_of(2) == (4, 5)
    assert PERMUTED.experts_of(0) == (1, 4)
    with pytest.raises(ValueError, match=r"experts=8.*ep=3"):
        ExpertPlacement.linear(8, 3)
