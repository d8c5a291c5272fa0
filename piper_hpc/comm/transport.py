"""Carrying out a hierarchical plan: rows packed, sent level by level and unpacked; levels overlap, buffers stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from piper_hpc.comm.channel import Channel, Work
from piper_hpc.comm.dedup import SegmentSum
from piper_hpc.comm.exchange import Finish
from piper_hpc.comm.hierarchical_plan import HierarchicalPlan
from piper_hpc.spec.all_to_all import Overlap

PartTransform = Callable[[int, torch.Tensor], torch.Tensor]
"""(part, rows [rows, hidden]) -> what is sent instead: before a dispatch's last level, or after a combine's first."""


class BufferPool:
    """Buffers that are used again: what it hands out is valid until the same name is asked for again.

    A buffer grows to the largest all-to-all so far and never shrinks: routing that was uneven once may be so again at
    any step, and allocating in the middle of a dispatch is what it is there to avoid. One buffer a name, dtype and
    device, and as many names as a plan has levels and chunks; all are freed with their dispatcher.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(self, name: str, rows: int, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised [rows, ...] with the row shape, dtype and device of `like`."""
        shape = (rows, *like.shape[1:])
        values = rows * like.shape[1:].numel()
        key = (name, like.dtype, like.device)
        kept = self._kept.get(key)
        if kept is None or kept.numel() < values:
            kept = self._kept[key] = like.new_empty(values)
        return kept[:values].view(shape)


class Transport:
    """Sends the rows of one plan at a time over `channels`, one a level. Rows are [rows, ...], sent as they are."""

    def __init__(self, channels: Sequence[Channel], overlap: Overlap) -> None:
        self.channels = channels
        self._overlap = overlap
        self._buffers = BufferPool()

    def begin_dispatch(
        self, source: torch.Tensor, index: torch.Tensor, plan: HierarchicalPlan, transform: PartTransform | None = None
    ) -> Finish:
        """Begin to send rows source[index] to their experts; finishing it returns [rows, hidden] by expert slot, as
        flat delivers them.

        source: [source rows, hidden]; index: int64 [rows sent at the first level]; transform: applied to what this rank
        sends at the last level of each part.
        """
        send_buffer = self._buffers.take("send", index.numel(), source)
        torch.index_select(source, 0, index, out=send_buffer)
        to_send = list(send_buffer.split([transfers[0].send_total for transfers in plan.parts]))
        recv_buffer = self._buffers.take("recv", plan.expert_order.numel(), source)
        recv = recv_buffer.split([transfers[-1].recv_total for transfers in plan.parts])
        relays = [
            self._relay(f"dispatch {step}", [transfers[step].recv_total for transfers in plan.parts[1:]], source)
            for step in range(plan.depth - 1)
        ]

        def post(part: int, step: int) -> Work:
            transfer, is_last = plan.parts[part][step], step == len(plan.parts[part]) - 1
            if transfer.pack is not None:
                received, _ = relays[step - 1]
                packed = self._buffers.take(f"packed {part} {step}", transfer.send_total, source)
                to_send[part] = torch.index_select(received, 0, transfer.pack, out=packed)
            if is_last and transform is not None:
                to_send[part] = transform(part, to_send[part])
            output = recv[part] if is_last else relays[step][1][part - 1]
            return self.channels[transfer.level].all_to_all(output, to_send[part], transfer.recv, transfer.send)

        rest = self._begin(plan, post, 1)  # of the widest level, which takes longest

        def finish() -> torch.Tensor:
            rest()
            return recv_buffer.index_select(0, plan.expert_order)

        return finish

    def begin_combine(
        self, rows: torch.Tensor, plan: HierarchicalPlan, transform: PartTransform | None = None, *, keep: bool = False
    ) -> Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]:
        """Begin to send rows as a dispatch delivered them, [rows, hidden], back to the ranks of their tokens.

        Finishing it returns the rows as they were sent at the first level, part by part, and for each part the rows
        that its last level of dispatch brings back, to the relaying rank. transform: applied to those of the chunks
        instead of that transfer's `unpack`; keep: the second result outlives the next call.
        """
        send_buffer = self._buffers.take("recv", plan.expert_order.numel(), rows)
        torch.index_select(rows, 0, plan.arrival_order, out=send_buffer)
        to_send = list(send_buffer.split([transfers[-1].recv_total for transfers in plan.parts]))
        recv_buffer = self._buffers.take("send", plan.send_tokens.numel(), rows)
        recv = recv_buffer.split([transfers[0].send_total for transfers in plan.parts])
        # What each level brings back of the chunks, the last level first; the first level brings rows to their tokens.
        relays = []
        for step in range(plan.depth - 1):
            name = None if keep and step == 0 else f"combine {step}"
            relays.append(self._relay(name, [transfers[-1 - step].send_total for transfers in plan.parts[1:]], rows))
        local = rows.new_empty((plan.local_rows, *rows.shape[1:])) if keep else recv[0]
        last_level = [local, *(relays[0][1] if relays else ())]

        def post(part: int, step: int) -> Work:
            transfer = plan.parts[part][-1 - step]
            if step:
                previous = plan.parts[part][-step]
                if step == 1 and transform is not None:
                    to_send[part] = transform(part, last_level[part])
                elif isinstance(previous.unpack, SegmentSum):
                    to_send[part] = previous.unpack(relays[step - 1][1][part - 1]).to(rows.dtype)
                elif previous.unpack is not None:
                    unpacked = self._buffers.take(f"unpacked {part} {step}", previous.unpack.numel(), rows)
                    to_send[part] = torch.index_select(relays[step - 1][0], 0, previous.unpack, out=unpacked)
            output = local if part == 0 else recv[part] if step == plan.depth - 1 else relays[step][1][part - 1]
            return self.channels[transfer.level].all_to_all(output, to_send[part], transfer.send, transfer.recv)

        rest = self._begin(plan, post, plan.depth)  # up to the widest level, which comes last here

        def finish() -> tuple[torch.Tensor, list[torch.Tensor]]:
            rest()
            return recv_buffer, last_level

        return finish

    def _relay(
        self, name: str | None, rows: Sequence[int], like: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A buffer for the rows of all chunks at one level, whole and by chunk; without a name it is not used again."""
        whole = (
            like.new_empty((sum(rows), *like.shape[1:])) if name is None else self._buffers.take(name, sum(rows), like)
        )
        return whole, whole.split(list(rows))

    def _begin(self, plan: HierarchicalPlan, post: Callable[[int, int], Work], steps: int) -> Callable[[], None]:
        """Post the first steps; what it returns posts and waits for the rest."""
        posting = self._post_all(plan, post)
        for _ in range(steps):
            next(posting, None)

        def rest() -> None:
            for _ in posting:
                pass

        return rest

    def _post_all(self, plan: HierarchicalPlan, post: Callable[[int, int], Work]) -> Iterator[None]:
        """Post every all-to-all (part, step) of the plan in the order of the overlap, each once its part's previous one
        has arrived; and wait for the last of each part. Yields after each step that is posted, before it waits."""
        parts = list(range(len(plan.parts)))
        if self._overlap == "none":
            for part in parts:
                for step in range(len(plan.parts[part])):
                    work = post(part, step)
                    yield
                    work.wait()
            return
        if self._overlap == "far_first":
            parts = [*parts[1:], 0]
        pending: dict[int, Work] = {}
        for step in range(max(map(len, plan.parts))):
            for part in parts:
                if step < len(plan.parts[part]):
                    if step:
                        pending[part].wait()
                    pending[part] = post(part, step)
            yield
        for part in parts:
            pending[part].wait()
