"""Metadata of deduplicated rows: values sent once a choice, beside rows that several choices share.

In dispatch each choice's row index and weight, in the backward of combine the weight's gradient the other way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.counts import LevelCounts
from piper_hpc.comm.flat_plan import inverse
from piper_hpc.comm.tables import LevelTable, regroup


@dataclass(frozen=True)
class MetadataTransfer:
    """One all-to-all of one value a choice at `level`, all chunks at once.

    send, recv: choices by peer. pack: for each value sent its index among those held before, int64 [choices sent];
    unpack: for each value held afterwards its index among those received, int64 [choices received].
    """

    level: int
    send: list[int]
    recv: list[int]
    pack: torch.Tensor
    unpack: torch.Tensor

    @staticmethod
    def of(level: int, counts: LevelCounts, table: LevelTable) -> MetadataTransfer:
        """The all-to-all of values held by chunk, then peer; messages are by peer, then chunk."""
        both = (counts.send_on_host, counts.recv_on_host)
        send, recv = ([sum(column) for column in zip(*by_chunk, strict=True)] for by_chunk in both)
        by_peer = counts.recv.flatten().index_select(0, table.by_peer)
        return MetadataTransfer(
            level,
            send,
            recv,
            regroup(counts.send.flatten(), table.by_peer, sum(send)),
            regroup(by_peer, table.by_chunk, sum(recv)),
        )

    def after(self, index: torch.Tensor) -> MetadataTransfer:
        """The same all-to-all of values that are first gathered by `index`, int64 [choices sent]."""
        return replace(self, pack=index.index_select(0, self.pack))

    def dispatch(self, values: torch.Tensor, channels: Sequence[Channel]) -> torch.Tensor:
        """Values [choices sent] towards the experts: [choices received]. channels: one a level."""
        received = values.new_empty(sum(self.recv))
        packed = values.index_select(0, self.pack)
        channels[self.level].all_to_all(received, packed, self.recv, self.send).wait()
        return received.index_select(0, self.unpack)

    def combine(self, values: torch.Tensor, channels: Sequence[Channel]) -> torch.Tensor:
        """The reverse of `dispatch`: values [choices received] back towards the tokens, [choices sent]."""
        received = values.new_empty(sum(self.send))
        packed = values.index_select(0, inverse(self.unpack))
        channels[self.level].all_to_all(received, packed, self.send, self.recv).wait()
        return received.index_select(0, inverse(self.pack))
