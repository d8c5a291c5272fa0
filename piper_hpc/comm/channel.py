"""One phase's exchange between real ranks, and the error that says who was missing.

When a peer is missing, on gloo `wait` raises at the group's time-out, whatever was exchanged. On back ends that order
streams (nccl, rccl, xccl) `wait` neither blocks nor raises: there the host looks after exchanges of counts, which it
reads anyway, and `settle` raises shortly before the back end's own watchdog would end the process. A peer that is lost
after the last counts of a step, while rows travel, is named by the next counts, or by the watchdog in its words.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

GRACE_S = 5.0
"""How long a rank whose exchange failed waits for the others to say how far they came."""

POLL_S = 50e-6
"""How often the host asks whether counts have come on a device: often, as it does nothing else in the meantime."""


class Pending(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return once the rows are there."""


class Channel(Protocol):
    """What moves rows among the ranks of one group; every rank of the group calls it equally often."""

    def exchange(
        self, output: torch.Tensor, source: torch.Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Pending:
        """Send `send[q]` rows of `source` to peer q and receive `receive[q]` rows into `output`, in peer order."""


def settle(exchanges: Iterable[Pending]) -> None:
    """Return once the host may read what came by `exchanges`, all waited for before: at once where `wait` blocks.

    Raises MissingPeerError where one does not come in time; see `GroupChannel.patience_s`.
    """
    for exchange in exchanges:
        if isinstance(exchange, GroupWork):
            exchange.settle()


class MissingPeerError(dist.DistError):
    """An exchange failed or timed out; the message names the phase and the first rank that did not enter it."""


class Local:
    """The channel of a group of one: a copy."""

    def exchange(
        self, output: torch.Tensor, source: torch.Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Pending:
        """See `Channel.exchange`."""
        output.copy_(source)
        return self

    def wait(self) -> None:
        """Nothing is under way."""


class GroupChannel:
    """A channel over a process group by `all_to_all_single`. phase: what an error calls it.

    Exchanges are numbered; two channels over the same ranks have different phases. never_empty: a rank that receives
    nothing sends itself a row that nobody sees; by default on RCCL, where X-MoE (arXiv 2508.13337) saw such ranks hang.
    """

    def __init__(self, group: dist.ProcessGroup, phase: str, *, never_empty: bool | None = None) -> None:
        self.group, self.phase, self.ranks = group, phase, tuple(dist.get_process_group_ranks(group))
        self.entered = 0
        self._never_empty = is_rccl(group) if never_empty is None else never_empty
        self._place = dist.get_rank(group)
        self._store = dist.PrefixStore(
            f"entered/{phase}/{'-'.join(map(str, self.ranks))}", dist.distributed_c10d._get_default_store()
        )

    def exchange(
        self, output: torch.Tensor, source: torch.Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> Pending:
        """See `Channel.exchange`. Raises MissingPeerError here, in `wait` (gloo), or in `settle` (device streams)."""
        self.entered += 1
        if self._never_empty and not sum(receive):
            output, source, receive, send = with_own_row(output, source, send, self._place)
        try:
            work = dist.all_to_all_single(output, source, list(receive), list(send), group=self.group, async_op=True)
        except RuntimeError as error:
            raise self.failed(error, self.entered) from None
        return GroupWork(self, work, self.entered)

    @property
    def patience_s(self) -> float:
        """How long the host waits for an exchange on a device: the group's time-out, less the time that the error
        needs before a watchdog ends the process at the time-out itself, which should be 10 s or more."""
        backend = self.group._get_backend(self.group._device_types[0])
        timeout_s = float(backend.options._timeout.total_seconds())
        return max(timeout_s / 2, timeout_s - 2 * GRACE_S)

    def failed(self, error: RuntimeError, number: int) -> MissingPeerError:
        """What to raise for exchange `number`. Ranks that fail leave in the store how far they came; who leaves nothing
        in time, or came less far, did not enter."""
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
        except RuntimeError:
            who = "the store that knows who entered it is gone, with rank 0 or its node"
        reason = str(error).strip().splitlines()[0]
        return MissingPeerError(
            f"all-to-all {self.phase}, exchange {number} of ranks {', '.join(map(str, self.ranks))}: {who} ({reason})"
        )

    def _reached(self, rank: int) -> int:
        return int(self._store.get(str(rank))) if self._store.check([str(rank)]) else 0


def is_rccl(group: dist.ProcessGroup) -> bool:
    """Whether the group exchanges by RCCL: torch's nccl back end on ROCm."""
    return torch.version.hip is not None and "nccl" in str(dist.get_backend(group))


def with_own_row(
    output: torch.Tensor, source: torch.Tensor, send: Sequence[int], place: int
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """The exchange of a rank that receives nothing, with a row of zeros from itself to itself: (output, source,
    receive, send). Other ranks see no difference."""
    own, before = list(send), sum(send[:place])
    row = source.new_zeros((1, *source.shape[1:]))
    own[place] += 1
    receive = [int(peer == place) for peer in range(len(own))]
    return output.new_empty((1, *output.shape[1:])), torch.cat((source[:before], row, source[before:])), receive, own


class GroupWork:
    """Exchange `number` of a channel."""

    def __init__(self, channel: GroupChannel, work: dist.Work, number: int) -> None:
        self._channel, self._work, self._number = channel, work, number
        self._posted_s = time.monotonic()

    def wait(self) -> None:
        """See `Pending.wait`: blocks on gloo, orders streams on a device."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise self._channel.failed(error, self._number) from None

    def settle(self) -> None:
        """See `piper_hpc.comm.channel.settle`."""
        while not self._work.is_completed():
            waited_s = time.monotonic() - self._posted_s
            if waited_s > self._channel.patience_s:
                raise self._channel.failed(RuntimeError(f"not there after {waited_s:.1f} s"), self._number)
            time.sleep(POLL_S)
