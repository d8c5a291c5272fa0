"""How a rank's gloo threads are scheduled, what rank 0 tells the others, and which device a rank takes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from piper_hpc.cluster.calibration import CalibrationError
from piper_hpc.runtime.group import (
    BACKENDS,
    GLOO_RECEIVER_THREAD,
    LOWEST_NICE,
    broadcast_from_rank0,
    device_of,
    lower_gloo_receiver_priority,
)
from tests.processes import COLLECTIVE_TIMEOUT_S, run_ranks

pytestmark = pytest.mark.processes


def _priorities(cores: int) -> tuple[set[int], set[int], float]:
    """Nice values of a new group's threads that receive and of all others, and an exchanged sum; rank has `cores`.

    They count from the process's own. Groups of earlier tests may still have threads here: those are left out.
    """
    all_cores = os.sched_getaffinity(0)
    usual, earlier = os.getpriority(os.PRIO_PROCESS, 0), {thread.name for thread in Path("/proc/self/task").glob("*")}
    group = dist.new_group([0, 1])
    try:
        os.sched_setaffinity(0, sorted(all_cores)[:cores])
        lower_gloo_receiver_priority()
    finally:
        os.sched_setaffinity(0, all_cores)  # the process goes on with other tests
    receiving, others = set(), set()
    for thread in Path("/proc/self/task").glob("*"):
        receives = (thread / "comm").read_text().strip() == GLOO_RECEIVER_THREAD
        if receives and thread.name in earlier:
            continue
        (receiving if receives else others).add(os.getpriority(os.PRIO_PROCESS, int(thread.name)) - usual)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return receiving, others, float(total)


def test_threads_that_receive_come_after_those_that_send_on_one_core() -> None:
    for receiving, others, total in run_ranks(2, _priorities, 1):
        assert receiving == {LOWEST_NICE} and others == {0}
        assert total == 2.0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_with_cores_to_choose_from_nothing_changes() -> None:
    for receiving, others, _ in run_ranks(2, _priorities, 2):
        assert receiving == others == {0}


class Untold(Exception):
    """An exception that pickle cannot make again: it is made of two words and keeps one."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def _answer() -> dict[str, int]:
    return {"rank": dist.get_rank()}


def _refused() -> None:
    raise CalibrationError("no gemm")


def _untold() -> None:
    raise Untold("so", "much")


def _of_no_pickle() -> Any:
    return lambda: None


_MAKES = {make.__name__: make for make in (_answer, _refused, _untold, _of_no_pickle)}


def _picklable(name: str) -> tuple[Any, str]:
    """What a rank is given, and the exception that it sees in its place."""
    try:
        return broadcast_from_rank0(_MAKES[name]), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def test_one_rank_works_and_all_are_told() -> None:
    assert run_ranks(2, _picklable, "_answer") == [({"rank": 0}, "")] * 2


def test_where_the_first_rank_fails_no_other_waits_for_it() -> None:
    begin = time.monotonic()
    assert run_ranks(2, _picklable, "_refused") == [(None, "CalibrationError: no gemm")] * 2
    assert run_ranks(2, _picklable, "_untold") == [
        (None, "Untold: so much"),
        (None, "RuntimeError: Untold on rank 0: so much"),
    ]
    first, second = run_ranks(2, _picklable, "_of_no_pickle")
    assert "_of_no_pickle" in first[1] and "_of_no_pickle" in second[1]
    assert time.monotonic() - begin < COLLECTIVE_TIMEOUT_S


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_rank_takes_the_device_that_it_is_shown(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, taken = torch.get_device_module(kind), []
    monkeypatch.setattr(module, "set_device", taken.append)
    monkeypatch.setattr(module, "device_count", lambda: 4)
    assert device_of(kind, 2, scheduled=True) == torch.device(kind, 2)
    with pytest.raises(RuntimeError, match=r"rank 4 of this node has no device .*ranks_per_node=4"):
        device_of(kind, 4, scheduled=True)
    monkeypatch.setattr(module, "device_count", lambda: 1)
    assert device_of(kind, 2, scheduled=True) == torch.device(kind, 0), "the scheduler shows each task its own"
    assert taken == [torch.device(kind, 2), torch.device(kind, 0)]
    monkeypatch.setattr(module, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match=f"cluster.device={kind}, but this rank sees no"):
        device_of(kind, 0, scheduled=True)
    assert BACKENDS[kind] == dist.Backend.default_device_backend_map[kind]
