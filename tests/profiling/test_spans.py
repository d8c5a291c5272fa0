"""Regions: nesting, backward, waits; live bytes; the trace document."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.memory import rss_bytes
from piper_hpc.profiling.spans import FORWARD, Message, Recorder, Span, self_seconds, split_wait_s
from piper_hpc.profiling.trace import write_trace
from piper_hpc.profiling.untimed import UntimedRecorder
from piper_hpc.spec import Layout, RankMap
from tests.peak import peak_tensor_bytes


class Ticks:
    """A clock that advances by one second whenever it is read."""

    def __init__(self) -> None:
        self.ticks = 0

    def start(self) -> None:
        pass

    def now(self) -> float:
        self.ticks += 1
        return float(self.ticks)

    def finish(self) -> None:
        pass

    def seconds(self, mark: float) -> float:
        return mark


def test_inner_regions_take_their_time_from_the_outer_one() -> None:
    recorder = Recorder(Ticks())
    recorder.start()
    with recorder.region("step"), recorder.region("host"):  # from 1 to 8, from 2 to 7
        with recorder.region("expert"):  # from 3 to 4
            pass
        with recorder.region("expert"):  # from 5 to 6
            pass
    seconds = self_seconds(recorder.finish())
    assert seconds == {"step": 2.0, "host": 3.0, "expert": 2.0}


def test_self_times_add_up_to_the_enclosing_span() -> None:
    spans = [Span("a", 0.0, 10.0), Span("b", 1.0, 4.0), Span("c", 1.0, 2.0), Span("b", 5.0, 9.0), Span("c", 6.0, 6.0)]
    seconds = self_seconds(spans)
    assert sum(seconds.values()) == pytest.approx(10.0)
    assert seconds == pytest.approx({"a": 3.0, "b": 6.0, "c": 1.0})


def test_backward_of_each_region_is_found_in_reverse_order() -> None:
    recorder = Recorder(CpuClock())
    recorder.start()
    shared = torch.ones(4, requires_grad=True)
    first = recorder.timed("attention", lambda x: x * 2, shared)
    second = recorder.timed("expert", lambda x: x.sin(), first)
    result = recorder.timed("combine", lambda x: (x + first).sum(), second)
    with recorder.backward_pass():
        result.backward()
    backward = [span.name for span in recorder.finish() if span.backward]
    assert backward == ["other", "combine", "expert", "attention"]
    assert torch.allclose(shared.grad, 2 * (1 + (2 * torch.ones(4)).cos()))


def test_a_backward_region_ends_where_the_next_one_opens_and_the_last_with_its_leaf() -> None:
    recorder = Recorder(Ticks())
    recorder.start()
    received = torch.ones(4, requires_grad=True)
    hidden = recorder.timed("attention", lambda x: x * 2, received)  # forward from 1 to 2
    hidden = recorder.timed("expert", lambda x: x.sin(), hidden)  # from 3 to 4
    with recorder.backward_pass():  # from 5 to 9
        hidden.sum().backward()
    backward = [span for span in recorder.finish() if span.backward]
    assert [(span.name, span.start_s, span.end_s) for span in backward] == [
        ("other", 5.0, 9.0),
        ("expert", 6.0, 7.0),
        ("attention", 7.0, 8.0),
    ]


def test_region_without_differentiable_input_ends_with_the_backward_pass() -> None:
    recorder = Recorder(Ticks())
    recorder.start()
    weight = torch.ones(3, 2, requires_grad=True)
    hidden = recorder.timed("head", lambda ids: weight[ids], torch.tensor([0, 2]))
    with recorder.backward_pass():
        hidden.sum().backward()
    outer, inner = (span for span in recorder.finish() if span.backward)
    assert (outer.name, inner.name) == ("other", "head")
    assert outer.start_s < inner.start_s < inner.end_s <= outer.end_s


def test_training_that_is_not_timed_gets_no_spans_hooks_or_posts() -> None:
    recorder = UntimedRecorder(Ticks())
    recorder.start()  # the step begins at 1
    given = torch.ones(3, requires_grad=True)
    with recorder.region("host"), recorder.waiting(Message(FORWARD, 0)), recorder.waiting(None):
        result = recorder.timed("expert", lambda x: x, given)
        recorder.post(Message(FORWARD, 0))
        with recorder.backward_pass():
            (2 * result).sum().backward()
    assert result is given and not given._backward_hooks, "neither a view nor a hook"
    assert given.grad is not None and given.grad.tolist() == [2.0] * 3
    assert recorder.finish() == [Span("other", 1.0, 2.0)] and recorder.posts() == {}


@pytest.mark.parametrize(
    ("start", "end", "posted", "bubble", "transfer"),
    [(0, 5, 2, 2, 3), (0, 5, -1, 0, 5), (0, 5, 5, 5, 0), (0, 5, 6, 5, 0)],
)
def test_wait_is_split_where_the_sender_posted(
    start: float, end: float, posted: float, bubble: float, transfer: float
) -> None:
    assert split_wait_s(start, end, posted) == (bubble, transfer)


def test_peak_counts_live_storages_once_and_forgets_the_freed() -> None:
    kept = torch.zeros(1000)
    around = peak_tensor_bytes(lambda: None)

    def work() -> None:
        first = torch.zeros(100_000)
        view = first[10:].view(-1, 10)
        del first
        second = view + 1.0
        del view
        torch.zeros(50_000).add_(second.sum())

    assert peak_tensor_bytes(work) - around == pytest.approx(2 * 400_000, abs=200)
    assert kept.numel() == 1000 and rss_bytes() > around


def test_peak_sees_what_autograd_keeps() -> None:
    weight = torch.zeros(256, 256, requires_grad=True)
    around = peak_tensor_bytes(lambda: None)

    def work() -> None:
        hidden = weight
        for _ in range(4):
            hidden = hidden.sin()
        hidden.sum().backward()

    size = 4 * 256 * 256
    assert 5 * size <= peak_tensor_bytes(work) - around <= 7 * size


def test_trace_has_one_row_per_rank_and_microseconds(tmp_path: Path) -> None:
    message = Message(FORWARD, 1, 3)
    first, second = RankMap.block(Layout(ep=2), 1, (0, 0)).places
    spans = {
        second: [Span("wait", 10.0, 10.5, message=message)],
        first: [Span("attention", 9.0, 9.001), Span("attention", 9.5, 9.502, backward=True)],
    }
    write_trace(tmp_path / "trace.json", spans)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert rows == {
        (0, 0): "rank 0: stage 0, replica 0, expert shard 0",
        (1, 1): "rank 1: stage 0, replica 0, expert shard 1",
    }
    timed = [(e["tid"], e["name"], e["cat"], round(e["ts"]), round(e["dur"])) for e in events if e["ph"] == "X"]
    assert timed == [
        (0, "attention", "forward", 0, 1000),
        (0, "attention", "backward", 500_000, 2000),
        (1, "wait", "forward", 1_000_000, 500_000),
    ]
    assert events[-1]["args"] == {"for": "activations", "stage": 1, "micro_batch": 3}
