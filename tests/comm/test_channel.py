"""What a rank does that receives nothing where the back end would hang, and over which groups channels go."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm import FlatDispatcher
from piper_hpc.comm.channel import GroupChannel, is_rccl, with_own_row
from piper_hpc.comm.family import Family
from piper_hpc.comm.levels import Places
from piper_hpc.spec import Placement
from tests.processes import run_ranks


def test_a_row_to_itself_leaves_the_others_messages_alone() -> None:
    source = torch.arange(10.0).view(5, 2)
    output, padded, receive, send = with_own_row(source.new_empty(0, 2), source, [2, 0, 0, 3], 2)
    assert output.shape == (1, 2) and receive == [0, 0, 1, 0] and send == [2, 0, 1, 3]
    parts = padded.split(send)
    assert torch.equal(parts[0], source[:2]) and torch.equal(parts[3], source[2:]) and not parts[2].any()
    _, padded, _, send = with_own_row(torch.empty(0), torch.empty(0), [0, 0], 1)
    assert send == [0, 1] and len(padded) == 1


def one_receives_nothing(never_empty: bool) -> tuple[list[float], list[list[int]]]:
    """All tokens go to rank 0; the rows that this rank ends with, and what it told the back end to receive."""
    told: list[list[int]] = []
    original = dist.all_to_all_single

    def telling(
        output: torch.Tensor, source: torch.Tensor, receive: list[int], send: list[int], **more: object
    ) -> object:
        told.append(receive)
        return original(output, source, receive, send, **more)

    channel = GroupChannel(dist.group.WORLD, "flat", never_empty=never_empty)
    dispatcher = FlatDispatcher.over(channel, 2)
    tokens = torch.full((3, 1), 1.0 + dist.get_rank(), requires_grad=True)
    dist.all_to_all_single = telling
    try:
        rows, handle = dispatcher.dispatch(
            tokens, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), Placement.linear(2, 2)
        )
        combined = dispatcher.combine(rows, handle)
        combined.sum().backward()
    finally:
        dist.all_to_all_single = original
    assert torch.equal(combined, tokens) and torch.equal(tokens.grad, torch.ones(3, 1))  # type: ignore[arg-type]
    return rows.flatten().tolist(), told


@pytest.mark.processes
@pytest.mark.parametrize("never_empty", [True, False])
def test_a_rank_without_rows_posts_one_where_it_must(never_empty: bool) -> None:
    """Counts, dispatch, combine, and the backward of both: what comes is the same, posted or not."""
    (first, _), (second, told) = run_ranks(2, one_receives_nothing, never_empty)
    assert first == [1.0] * 3 + [2.0] * 3 and second == []
    assert told[1] == ([0, 1] if never_empty else [0, 0])
    assert told[2] == [3, 0], "in combine it receives, and posts nothing beside"


def backend_is_watched() -> bool:
    return is_rccl(dist.group.WORLD)


@pytest.mark.processes
def test_gloo_needs_no_such_row() -> None:
    assert run_ranks(2, backend_is_watched) == [False, False]


def shared_groups() -> tuple[int, bool]:
    """Groups that one family makes for all algorithms, and whether those with equal hops share channels."""
    family = Family(Places((0, 0, 1, 1), (0, 0, 0, 0)), range(4), timedelta(seconds=20))
    made, original = [], dist.new_group

    def counting(ranks: list[int], **more: object) -> object:
        made.append(tuple(ranks))
        return original(ranks, **more)

    dist.new_group = counting
    try:
        by_name = {name: family.dispatcher(name) for name in ("flat", "halo", "halo_dedup", "halo3", "flat_dedup")}
    finally:
        dist.new_group = original
    same = by_name["halo"]._travel.channels == by_name["halo_dedup"]._travel.channels  # type: ignore[union-attr]
    return len(made), same


@pytest.mark.processes
def test_algorithms_share_groups_of_equal_ranks() -> None:
    """All four ranks, two rails and two nodes."""
    assert run_ranks(4, shared_groups) == [(5, True)] * 4
