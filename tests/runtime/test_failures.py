"""Exceptions are classified by their root cause, however often they were wrapped."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from piper_hpc.runs import FAILURE_CLASSES
from piper_hpc.runs.checkpoints import CheckpointError
from piper_hpc.runtime.failures import classify, one_line_reason
from piper_hpc.runtime.group import RendezvousError
from piper_hpc.spec import Problem, SpecError
from piper_hpc.train.vote import NonFiniteError


@pytest.mark.parametrize(
    ("error", "failure_class"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), "oom"),
        (RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.1]:42"), "comm"),
        (RuntimeError("Timed out waiting 60000ms for send operation"), "hang"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (CheckpointError.of(Path("c"), "rank 0 could not write: OSError: No space left on device"), "disk_full"),
        (SpecError(Problem("data.path", "t", "has no index.json", "another")), "data"),
        (SpecError(Problem("train.seed", 1, "must be 0", "train.seed=0")), "config"),
        (NonFiniteError("step 2: the gradient is not finite"), "numerical"),
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
