"""How a rank's gloo threads are scheduled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from piper_hpc.runtime.group import GLOO_RECEIVER, let_senders_go_first
from tests.processes import run_ranks

pytestmark = pytest.mark.processes


def _policies() -> tuple[set[int], set[int], float]:
    """Scheduling policies of the threads that receive and of all others, and a sum that they exchanged."""
    group = dist.new_group([0, 1])
    let_senders_go_first()
    receiving, others = set(), set()
    for thread in Path("/proc/self/task").glob("*"):
        receives = (thread / "comm").read_text().strip() == GLOO_RECEIVER
        (receiving if receives else others).add(os.sched_getscheduler(int(thread.name)))
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    return receiving, others, float(total)


def test_threads_that_receive_interrupt_nobody() -> None:
    for receiving, others, total in run_ranks(2, _policies):
        assert receiving == {os.SCHED_BATCH}
        assert others == {os.SCHED_OTHER}
        assert total == 2.0
