"""Exceptions are classified by their root cause, however often they were wrapped."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from piper_hpc.runs import FAILURE_CLASSES
from piper_hpc.runtime.failures import classify, one_line_reason
from piper_hpc.runtime.group import RendezvousError


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "oom"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]:42"), "comm"),
        (RuntimeError("Timed out waiting 60000ms for send operation"), "comm"),
        (dist.DistBackendError("NCCL error"), "comm"),
        (RendezvousError("rank 0 left no address"), "rendezvous"),
        (ValueError("shapes differ"), "error"),
    ],
)
def test_the_root_cause_decides(error, failure_class):
    assert classify(error) == failure_class
    assert failure_class in FAILURE_CLASSES
    if failure_class == "rendezvous":
        return
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("[Stage 0] failed to run forward:") from inner
    except RuntimeError as wrapped:
        assert classify(wrapped) == failure_class
        assert one_line_reason(wrapped) == one_line_reason(error)
