"""The all-to-all of one level over a process group, and the error that says which rank was missing.

Where a peer is missing, gloo's `wait` raises at the group's time-out. On back ends that order streams (nccl, rccl,
xccl) `wait` neither blocks nor raises: there the host polls the all-to-alls of counts, which it has to read anyway, and
`wait_on_host` raises shortly before the back end's own watchdog would end the process. A peer that is lost after the
last counts of a step, during an all-to-all of rows, is named at the next counts, or by the watchdog in its words.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

GRACE_S = 5.0
"""How long a rank whose all-to-all failed waits for the others to record how many they entered."""

POLL_S = 50e-6
"""How often the host polls for counts on a device: often, as it does nothing else in the meantime."""


class Work(Protocol):
    """An all-to-all that was posted; as torch.distributed.Work."""

    def wait(self) -> None:
        """Return once later operations on this rank's device may read the rows."""


class Channel(Protocol):
    """The all-to-alls of one group of ranks, of which every rank posts the same number in the same order."""

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        """Post an uneven all-to-all: `send_rows[q]` rows of `source` [sum(send_rows), ...] to peer q, `recv_rows[q]`
        from it into `output` [sum(recv_rows), ...], both in peer order."""


def wait_on_host(works: Iterable[Work]) -> None:
    """Return once the host may read what `works` received, all waited for before: at once where `wait` blocks.

    Raises MissingPeerError where one ended in an error, or does not end in time; see `GroupChannel.host_timeout_s`.
    """
    for work in works:
        if isinstance(work, GroupWork):
            work.wait_on_host()


class MissingPeerError(dist.DistError):
    """An all-to-all failed or timed out; the message names the phase and the first rank that did not enter it."""


class Local:
    """The channel of a group of one: a copy."""

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        """See `Channel.all_to_all`."""
        output.copy_(source)
        return self

    def wait(self) -> None:
        """The copy is done already."""


class GroupChannel:
    """A channel over a process group by `all_to_all_single`. phase: its name in errors.

    All-to-alls are numbered; two channels over the same ranks have different phases. never_empty: a rank that receives
    nothing sends itself a padding row, which no caller sees; by default on RCCL, where X-MoE (arXiv 2508.13337) saw
    such ranks hang.
    """

    def __init__(self, group: dist.ProcessGroup, phase: str, *, never_empty: bool | None = None) -> None:
        self.group, self.phase, self.ranks = group, phase, tuple(dist.get_process_group_ranks(group))
        self.entered = 0
        self._never_empty = is_rccl(group) if never_empty is None else never_empty
        self._place = dist.get_rank(group)
        self._store = dist.PrefixStore(
            f"entered/{phase}/{'-'.join(map(str, self.ranks))}", dist.distributed_c10d._get_default_store()
        )

    def all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, recv_rows: Sequence[int], send_rows: Sequence[int]
    ) -> Work:
        """See `Channel.all_to_all`. Raises MissingPeerError here, in `wait` (gloo), or in `wait_on_host` (streams)."""
        self.entered += 1
        if self._never_empty and not sum(recv_rows):
            output, source, recv_rows, send_rows = with_padding_row(output, source, send_rows, self._place)
        try:
            work = dist.all_to_all_single(
                output, source, list(recv_rows), list(send_rows), group=self.group, async_op=True
            )
        except RuntimeError as error:
            raise self.failed(error, self.entered) from None
        return GroupWork(self, work, self.entered, blocks=wait_blocks(output))

    @property
    def host_timeout_s(self) -> float:
        """How long the host waits for an all-to-all on a device: the group's time-out, less the time that the error
        needs before a watchdog ends the process at the time-out itself, which should be 10 s or more."""
        backend = self.group._get_backend(self.group._device_types[0])
        timeout_s = float(backend.options._timeout.total_seconds())
        return max(timeout_s / 2, timeout_s - 2 * GRACE_S)

    def failed(self, error: Exception, number: int) -> MissingPeerError:
        """The error to raise for all-to-all `number`. Ranks that fail record in the store how many they entered; a rank
        that records nothing in time, or a lower number, did not enter this one."""
        told: list[str] = []
        # Asked in a thread: a store whose process is stopped, or cut off, answers never, and has no time-out.
        asking = threading.Thread(target=lambda: told.append(self._who_is_late(number)), daemon=True)
        asking.start()
        asking.join(2 * GRACE_S)
        who = told[0] if told else "the store that knows who entered it does not answer: rank 0, or its node, may hang"
        reason = str(error).strip().splitlines()[0]
        return MissingPeerError(
            f"all-to-all {self.phase}, exchange {number} of ranks {', '.join(map(str, self.ranks))}: {who} ({reason})"
        )

    def _who_is_late(self, number: int) -> str:
        late: list[int] = []
        try:
            self._store.set(str(dist.get_rank()), str(self.entered))
            deadline = time.monotonic() + GRACE_S
            while True:
                late = [rank for rank in self.ranks if self._reached(rank) < number]
                if not late or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            who = f"rank {late[0]} is the first that did not enter it" if late else "every rank had entered it"
            if late and (reached := self._reached(late[0])):
                who += f" (its last was number {reached})"
            return who
        except RuntimeError:
            return "the store that knows who entered it is gone, with rank 0 or its node"

    def _reached(self, rank: int) -> int:
        return int(self._store.get(str(rank))) if self._store.check([str(rank)]) else 0


def is_rccl(group: dist.ProcessGroup) -> bool:
    """Whether the group communicates by RCCL: torch's nccl back end on ROCm."""
    return torch.version.hip is not None and "nccl" in str(dist.get_backend(group))


def with_padding_row(
    output: torch.Tensor, source: torch.Tensor, send_rows: Sequence[int], place: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """The all-to-all of a rank that receives nothing, with a row of zeros from peer `place`, itself, to itself:
    (output, source, recv_rows, send_rows). Other ranks see no difference."""
    padded, before = list(send_rows), sum(send_rows[:place])
    row = source.new_zeros((1, *source.shape[1:]))
    padded[place] += 1
    recv_rows = [int(peer == place) for peer in range(len(padded))]
    source = torch.cat((source[:before], row, source[before:]))
    return output.new_empty((1, *output.shape[1:])), source, recv_rows, padded


def wait_blocks(output: torch.Tensor) -> bool:
    """Whether the `wait` of a work that fills `output` blocks the host and raises; on a device it orders streams."""
    return output.device.type == "cpu"


class GroupWork:
    """All-to-all `number` of a channel. blocks: see `wait_blocks`."""

    def __init__(self, channel: GroupChannel, work: dist.Work, number: int, *, blocks: bool) -> None:
        self._channel, self._work, self._number, self._blocks = channel, work, number, blocks
        self._posted_s = time.monotonic()

    def wait(self) -> None:
        """See `Work.wait`: blocks on gloo, orders streams on a device."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._channel.failed(error, self._number) from None

    def wait_on_host(self) -> None:
        """See `piper_hpc.comm.channel.wait_on_host`."""
        if self._blocks:
            return
        while not self._work.is_completed():
            waited_s = time.monotonic() - self._posted_s
            if waited_s > self._channel.host_timeout_s:
                raise self._channel.failed(RuntimeError(f"not there after {waited_s:.1f} s"), self._number)
            time.sleep(POLL_S)
        # What failed is completed too, and on a device `wait` says nothing of it.
        if (error := self._work.exception()) is not None:
            raise self._channel.failed(error, self._number)
