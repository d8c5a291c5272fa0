"""What exchanges carry so that a wrong one shows, in every type and for groups of any size; how a group ends."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from piper_hpc.microbench.exchanges import COLLECTIVES, process_group, reduction_input, reduction_result, wrong_values
from piper_hpc.microbench.groups import GroupFamily
from tests.processes import run_ranks

CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def reduction_inputs(members: int, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [reduction_input(place, members, elements, CPU, dtype) for place in range(members)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [2, 5, 64, 600])
def test_sums_are_exact_in_whatever_order_they_are_added(members: int, dtype: torch.dtype) -> None:
    elements = 4 * members
    parts, expected = reduction_inputs(members, elements, dtype), reduction_result(elements, CPU, dtype)
    one_by_one = torch.zeros(elements, dtype=dtype)
    for part in parts:
        one_by_one += part
    assert wrong_values(one_by_one, expected) == 0
    while len(parts) > 1:  # a tree, neighbours first
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=False)] + parts[len(parts) & ~1 :]
    assert wrong_values(parts[0], expected) == 0
    assert expected.unique().numel() == min(elements, 251)


def test_sums_of_ones_would_not_be_exact() -> None:
    ones = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(300):
        ones += 1
    assert float(ones) == 256


@pytest.mark.parametrize("members", [4, 64])
def test_a_member_that_is_missed_or_counted_twice_shows_and_so_does_a_wrong_part(members: int) -> None:
    elements = 16 * members
    parts, expected = (
        reduction_inputs(members, elements, torch.bfloat16),
        reduction_result(elements, CPU, torch.bfloat16),
    )
    for place in range(members):
        assert wrong_values(expected - parts[place], expected) == 16
        assert wrong_values(expected + parts[place], expected) == 16
    shares = expected.chunk(members)
    for place in range(1, members):
        assert wrong_values(shares[place], shares[place - 1]) == 16


def _wrong_in_bfloat16() -> dict[str, int]:
    members = list(range(dist.get_world_size()))
    return {name: make(None, members, 1024, CPU, torch.bfloat16)[1] for name, make in COLLECTIVES.items()}


def _groups_after_an_error() -> tuple[int, int]:
    """Sizes of this rank's group while it is there and after an error that all ranks see."""
    size = 0
    with pytest.raises(KeyError), process_group(GroupFamily(2, "node", ((0, 1), (2, 3)))) as group:
        size = dist.get_world_size(group)
        dist.barrier(group)  # a rank that ends its group closes the connections that another may still be making
        raise KeyError
    return size, len(dist.distributed_c10d._world.pg_map)


@pytest.mark.processes
def test_exchanges_of_bfloat16_are_right() -> None:
    assert run_ranks(4, _wrong_in_bfloat16) == [dict.fromkeys(COLLECTIVES, 0)] * 4


@pytest.mark.processes
def test_an_error_ends_the_group_that_was_made() -> None:
    assert run_ranks(4, _groups_after_an_error) == [(2, 1)] * 4, "the default group is left"
