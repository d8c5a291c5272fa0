"""What a rank does that receives nothing where the back end would hang, over which groups channels go, and how a host
learns of counts on a device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm import FlatDispatcher, channel
from piper_hpc.comm.channel import GroupChannel, MissingPeerError, is_rccl, with_padding_row
from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.spec import ExpertPlacement
from tests.processes import run_ranks


def test_a_row_to_itself_leaves_the_others_messages_alone() -> None:
    source = torch.arange(10.0).view(5, 2)
    output, padded, receive, send = with_padding_row(source.new_empty(0, 2), source, [2, 0, 0, 3], 2)
    assert output.shape == (1, 2) and receive == [0, 0, 1, 0] and send == [2, 0, 1, 3]
    parts = padded.split(send)
    assert torch.equal(parts[0], source[:2]) and torch.equal(parts[3], source[2:]) and not parts[2].any()
    _, padded, _, send = with_padding_row(torch.empty(0), torch.empty(0), [0, 0], 1)
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

    dispatcher = FlatDispatcher.over(GroupChannel(dist.group.WORLD, "flat", never_empty=never_empty), 2)
    tokens = torch.full((3, 1), 1.0 + dist.get_rank(), requires_grad=True)
    dist.all_to_all_single = telling
    try:
        begun, handle = dispatcher.dispatch(
            tokens, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), ExpertPlacement.linear(2, 2)
        )
        rows = handle.rows(begun)
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
    factory = DispatcherFactory(Places((0, 0, 1, 1), (0, 0, 0, 0)), range(4), timedelta(seconds=20))
    made, original = [], dist.new_group

    def counting(ranks: list[int], **more: object) -> object:
        made.append(tuple(ranks))
        return original(ranks, **more)

    dist.new_group = counting
    try:
        by_name = {name: factory.dispatcher(name) for name in ("flat", "halo", "halo_dedup", "halo3", "flat_dedup")}
    finally:
        dist.new_group = original
    same = by_name["halo"]._transport.channels == by_name["halo_dedup"]._transport.channels  # type: ignore[union-attr]
    return len(made), same


@pytest.mark.processes
def test_algorithms_share_groups_of_equal_ranks() -> None:
    """All four ranks, two rails and two nodes."""
    assert run_ranks(4, shared_groups) == [(5, True)] * 4


class DeviceWork:
    """A work as a device's back end gives it: `wait` says nothing to the host, which has to ask. It needs so many
    questions, or never ends; a work that failed is completed too."""

    def __init__(self, work: dist.Work, questions: float, error: RuntimeError | None = None) -> None:
        self.work, self.questions, self.asked, self.error = work, questions, 0, error

    def wait(self) -> None:
        """In order, but the host does not know it: what is on the host of this test has to be there in truth."""
        if self.questions < math.inf:
            self.work.wait()

    def is_completed(self) -> bool:
        self.asked += 1
        return self.asked > self.questions

    def exception(self) -> RuntimeError | None:
        return self.error


def on_a_device(questions: float, error: RuntimeError | None = None) -> tuple[list[DeviceWork], Any]:
    """Works that `dist.all_to_all_single` gives from now on, and a patch that makes it give them."""
    made: list[DeviceWork] = []
    original = dist.all_to_all_single

    def posting(*arguments: Any, **more: Any) -> DeviceWork:
        made.append(DeviceWork(original(*arguments, **more), questions, error))
        return made[-1]

    @contextmanager
    def device() -> Iterator[None]:
        with patch.object(dist, "all_to_all_single", posting), patch.object(channel, "wait_blocks", return_value=False):
            yield

    return made, device()


def asked_of_a_device(algorithm: str) -> list[int]:
    """By exchange of one dispatch and combine, how often the host asked for it."""
    factory = DispatcherFactory(Places((0, 0, 1, 1), (0, 0, 0, 0)), range(4), timedelta(seconds=20))
    dispatcher = factory.dispatcher(algorithm, chunks=1)
    made, device = on_a_device(3)
    with device:
        ids = torch.arange(4).view(2, 2)
        begun, handle = dispatcher.dispatch(torch.ones(2, 1), ids, torch.ones(2, 2), ExpertPlacement.linear(4, 4))
        rows = handle.rows(begun)
        dispatcher.combine(rows, handle)  # type: ignore[arg-type]
    return [work.asked for work in made]


@pytest.mark.processes
@pytest.mark.parametrize(("algorithm", "counts"), [("flat", 1), ("halo", 2)])
def test_the_host_asks_for_counts_alone(algorithm: str, counts: int) -> None:
    """Until they are there; rows stay the device's own affair."""
    for asked in run_ranks(4, asked_of_a_device, algorithm):
        assert asked[:counts] == [4] * counts
        assert len(asked) > counts and not any(asked[counts:])


def alone_on_a_device() -> tuple[str, float]:
    """Rank 1 enters no exchange; what rank 0 is told, and after how long."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=4))
    dispatcher = FlatDispatcher(group)
    if dist.get_rank() == 1:
        return "", 0.0
    made, device = on_a_device(math.inf)
    begun_s = time.monotonic()
    with device, patch.object(channel, "GRACE_S", 1.0):
        try:
            dispatcher.dispatch(
                torch.ones(1, 1), torch.zeros(1, 1).long(), torch.ones(1, 1), ExpertPlacement.linear(2, 2)
            )
        except MissingPeerError as error:
            message, took_s = str(error), time.monotonic() - begun_s
        else:
            message, took_s = "no error", 0.0
    with suppress(RuntimeError):
        made[0].work.wait()
    return message, took_s


@pytest.mark.processes
def test_a_peer_missing_on_a_device_is_named_before_the_watchdog_ends_the_process() -> None:
    message, took_s = run_ranks(2, alone_on_a_device)[0]
    assert message.startswith("all-to-all flat, exchange 1 of ranks 0, 1: rank 1 is the first that did not enter it")
    assert "not there after 2" in message and 2 < took_s < 4, "the group's 4 s less twice the grace"


def failing_on_a_device() -> str:
    """What rank 0 is told of an all-to-all that its back end completed with an error; rank 1 enters none."""
    channel_ = GroupChannel(dist.new_group([0, 1], timeout=timedelta(seconds=4)), "counts")
    if dist.get_rank() == 1:
        return ""
    made, device = on_a_device(3, RuntimeError("NCCL communicator was aborted on rank 0\nand more"))
    message = "no error"
    with device, patch.object(channel, "GRACE_S", 1.0):
        work = channel_.all_to_all(torch.empty(2), torch.ones(2), [1, 1], [1, 1])
        try:
            channel.wait_on_host([work])
        except MissingPeerError as error:
            message = str(error)
    with suppress(RuntimeError):
        made[0].work.wait()
    return message


@pytest.mark.processes
def test_work_that_ended_in_an_error_is_not_taken_for_a_finished_one() -> None:
    message = run_ranks(2, failing_on_a_device)[0]
    assert message.startswith("all-to-all counts, exchange 1 of ranks 0, 1: rank 1 is the first that did not enter it")
    assert message.endswith("(NCCL communicator was aborted on rank 0)")
