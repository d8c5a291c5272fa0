"""Values that every single choice takes along beside the rows that choices share: its row on the way out, its weight,
and on the way home the weight's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from piper_hpc.comm.channel import Channel
from piper_hpc.comm.counts import Numbers
from piper_hpc.comm.plan import inverse
from piper_hpc.comm.tables import LevelTable, regroup


@dataclass(frozen=True)
class Parcel:
    """One exchange of values of all chunks at once, at `level`. send, receive: choices by peer; pack: the place of each
    value of the messages among those held; unpack: of each value held afterwards among those that came."""

    level: int
    send: list[int]
    receive: list[int]
    pack: torch.Tensor
    unpack: torch.Tensor

    @staticmethod
    def of(level: int, numbers: Numbers, table: LevelTable) -> Parcel:
        """The exchange of values held by chunk, then peer: messages go by peer, then chunk."""
        both = (numbers.choices_out, numbers.choices_in)
        send, receive = ([sum(column) for column in zip(*by_chunk, strict=True)] for by_chunk in both)
        by_peer = numbers.into.flatten().index_select(0, table.by_peer)
        return Parcel(
            level,
            send,
            receive,
            regroup(numbers.out.flatten(), table.by_peer, sum(send)),
            regroup(by_peer, table.by_chunk, sum(receive)),
        )

    def after(self, index: torch.Tensor) -> Parcel:
        """The same exchange of values that are first taken in the order `index`."""
        return replace(self, pack=index.index_select(0, self.pack))

    def carry(self, values: torch.Tensor, channels: Sequence[Channel]) -> torch.Tensor:
        """Values [choices sent] to their next rank: [choices received]."""
        came = values.new_empty(sum(self.receive))
        packed = values.index_select(0, self.pack)
        channels[self.level].exchange(came, packed, self.receive, self.send).wait()
        return came.index_select(0, self.unpack)

    def bring(self, values: torch.Tensor, channels: Sequence[Channel]) -> torch.Tensor:
        """The way back of `carry`."""
        came = values.new_empty(sum(self.send))
        packed = values.index_select(0, inverse(self.unpack))
        channels[self.level].exchange(came, packed, self.send, self.receive).wait()
        return came.index_select(0, inverse(self.pack))
