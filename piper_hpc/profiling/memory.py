"""Peak memory of one rank: live tensor bytes on a CPU, allocated bytes on a GPU."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable

import psutil
import torch
from torch.autograd import profiler

# Kineto announces every start and stop of a profile on stderr unless told not to before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "5")


def rss_bytes() -> int:
    """Resident memory of this process, libraries and all."""
    return int(psutil.Process().memory_info().rss)


def live_tensor_bytes() -> int:
    """Bytes of every CPU tensor storage that Python can reach, each storage once."""
    storages: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def cpu_peak_bytes(work: Callable[[], None]) -> int:
    """Run `work` and return the peak of live tensor bytes: what lived before plus what the allocator then reported.

    The allocator's events slow the work down several times: for one step in a run, and never for a step that is timed.
    """
    before = live_tensor_bytes()
    with profiler.profile(use_kineto=True, profile_memory=True) as profile:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    live = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        live += change
        peak = max(peak, live)
    return before + peak
