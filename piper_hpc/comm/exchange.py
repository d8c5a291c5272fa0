"""An exchange of rows in two halves, in forward and in backward: what runs between them does so beside the wire."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from piper_hpc.comm.channel import Channel

Finish = Callable[[], torch.Tensor]
"""Waits for an exchange that was begun, and returns the rows that it brought."""

Begin = Callable[[torch.Tensor], Finish]
"""Posts the exchange of rows [rows, hidden]."""


@dataclass
class Exchange:
    """One exchange. forward: begins that of rows; backward: that of their gradients, the other way; under_way: what
    finishes the one that was begun."""

    forward: Begin
    backward: Begin
    under_way: Finish | None = None

    def finish(self) -> torch.Tensor:
        """Wait for the one that was begun; what it held is let go."""
        finish, self.under_way = self.under_way, None
        assert finish is not None, "an exchange is finished once"
        return finish()


def begin_exchange(rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Begin the exchange of `rows` [rows, hidden]. Returns what `finish_exchange` is given: a tensor without values,
    the edge along which autograd comes from one half to the other.

    Autograd runs nodes in the reverse of their creation: the gradients' exchange is begun where the rows' was finished,
    then comes the backward of what was computed between the two, and only then are the gradients waited for.
    """
    begun: torch.Tensor = BeginExchange.apply(rows, exchange)
    return begun


def finish_exchange(begun: torch.Tensor, exchange: Exchange) -> torch.Tensor:
    """Wait for the rows that the exchange brings, [rows, hidden]."""
    rows: torch.Tensor = FinishExchange.apply(begun, exchange)
    return rows


class BeginExchange(torch.autograd.Function):
    """See `begin_exchange`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.under_way = exchange.forward(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _begun: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.exchange.finish(), None


class FinishExchange(torch.autograd.Function):
    """See `finish_exchange`."""

    @staticmethod
    def forward(ctx: Any, begun: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.finish()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.exchange.under_way = ctx.exchange.backward(gradient)
        return gradient.new_empty(0), None


def all_to_all_of(channel: Channel, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Exchange:
    """One uneven all-to-all: `send_rows[r]` rows to peer r and `recv_rows[r]` from it, in peer order."""

    def begin(send: Sequence[int], recv: Sequence[int], rows: torch.Tensor) -> Finish:
        received = rows.new_empty((sum(recv), *rows.shape[1:]))
        work = channel.all_to_all(received, rows.contiguous(), recv, send)

        def finish() -> torch.Tensor:
            work.wait()
            return received

        return finish

    return Exchange(partial(begin, send_rows, recv_rows), partial(begin, recv_rows, send_rows))
