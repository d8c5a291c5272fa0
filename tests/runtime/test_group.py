"""How a rank's gloo threads are scheduled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from piper_hpc.runtime.group import GLOO_RECEIVER, LOWEST_PRIORITY, let_senders_go_first
from tests.processes import run_ranks

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
        let_senders_go_first()
    finally:
        os.sched_setaffinity(0, all_cores)  # the process goes on with other tests
    receiving, others = set(), set()
    for thread in Path("/proc/self/task").glob("*"):
        receives = (thread / "comm").read_text().strip() == GLOO_RECEIVER
        if receives and thread.name in earlier:
            continue
        (receiving if receives else others).add(os.getpriority(os.PRIO_PROCESS, int(thread.name)) - usual)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return receiving, others, float(total)


def test_threads_that_receive_come_after_those_that_send_on_one_core() -> None:
    for receiving, others, total in run_ranks(2, _priorities, 1):
        assert receiving == {LOWEST_PRIORITY} and others == {0}
        assert total == 2.0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_with_cores_to_choose_from_nothing_changes() -> None:
    for receiving, others, _ in run_ranks(2, _priorities, 2):
        assert receiving == others == {0}
