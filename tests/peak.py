"""The peak of live tensor bytes of a piece of work."""

from __future__ import annotations

from collections.abc import Callable

from piper_hpc.profiling.memory import LiveBytes


def peak_tensor_bytes(work: Callable[[], None]) -> int:
    """Run `work`; the peak of live tensor bytes meanwhile."""
    with LiveBytes() as memory:
        work()
    return memory.peak_bytes
