"""Many ranks in one process: a thread each, whose exchanges meet in memory. The code under test is that of real ranks;
only the channel is another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from piper_hpc.comm.channel import Channel, Work
from piper_hpc.comm.factory import builder
from piper_hpc.comm.hierarchy import Hierarchy, Places
from piper_hpc.spec import get_algorithm

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Message:
    """What a rank sent in one exchange. dimensions: 2 where it is rows, 1 where one value a choice; bytes_to: by rank,
    also to itself."""

    dtype: torch.dtype
    dimensions: int
    bytes_to: dict[int, int]


class Mailbox:
    """What waits for one rank: by (phase, group, exchange number) the part of each source."""

    def __init__(self) -> None:
        self.mail: dict[tuple[object, ...], dict[int, torch.Tensor]] = {}
        self.changed = threading.Condition()


class Switchboard:
    """The mailboxes of all ranks, and by rank the phase and message of every exchange that it entered."""

    def __init__(self, ranks: int) -> None:
        self.boxes = [Mailbox() for _ in range(ranks)]
        self.calls: list[list[tuple[str, Message]]] = [[] for _ in range(ranks)]
        self.failed = False

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """`function(rank)` on a thread each, results in rank order; the first exception is raised."""
        results: list[Any] = [None] * len(self.boxes)
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.failed = True
                for box in self.boxes:
                    with box.changed:
                        box.changed.notify_all()

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(self.boxes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "a rank did not come to an end"
        assert not any(box.mail for box in self.boxes), "messages that nobody received"
        return results


class MemoryChannel:
    """One rank's channel to the ranks of `group`; checks that what is sent is what is expected, in rows and dtype."""

    def __init__(self, board: Switchboard, phase: str, group: Sequence[int], rank: int) -> None:
        self.board, self.phase, self.group, self.rank = board, phase, tuple(group), rank
        self.number = 0

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        board, self.number = self.board, self.number + 1
        assert output.is_contiguous() and source.is_contiguous()
        assert len(output) == sum(recv_rows) and len(source) == sum(send_rows)
        parts_to = dict(zip(self.group, source.split(list(send_rows)), strict=True))
        bytes_to = {peer: part.numel() * part.element_size() for peer, part in parts_to.items()}
        board.calls[self.rank].append((self.phase, Message(source.dtype, source.dim(), bytes_to)))
        for peer, part in parts_to.items():
            box = board.boxes[peer]
            with box.changed:
                parts = box.mail.setdefault((self.phase, self.group, self.number), {})
                parts[self.rank] = part.clone()
                if len(parts) == len(self.group):
                    box.changed.notify_all()
        return _Arrival(self, self.number, output, list(recv_rows))


class _Arrival:
    def __init__(self, channel: MemoryChannel, number: int, output: torch.Tensor, receive: list[int]) -> None:
        self.channel, self.number, self.output, self.receive = channel, number, output, receive

    def wait(self) -> None:
        channel, board = self.channel, self.channel.board
        box = board.boxes[channel.rank]
        key, group = (channel.phase, channel.group, self.number), channel.group
        with box.changed:
            there = box.changed.wait_for(lambda: board.failed or len(box.mail.get(key, ())) == len(group), TIMEOUT_S)
            assert there and not board.failed, "a peer did not enter"
            came = box.mail.pop(key)
        parts = [came[peer] for peer in group]
        for into, part in zip(self.output.split(self.receive), parts, strict=True):
            assert into.shape == part.shape and into.dtype == part.dtype
            into.copy_(part)


def dispatcher(
    board: Switchboard, algorithm: str, places: Places, rank: int, hierarchy: Hierarchy | None = None, **options: Any
) -> Any:
    """The dispatcher of one rank of `places` that the registry names, on a switchboard."""
    hierarchy = hierarchy or Hierarchy(algorithm, places)
    channels: list[Channel] = [
        MemoryChannel(board, hierarchy.phase(level), hop.group, rank)
        for level, hop in enumerate(hierarchy.chain(rank).hops)
    ]
    return builder(algorithm)(hierarchy, rank, channels, dedup=get_algorithm(algorithm).dedup, **options)
