"""Peak memory of one rank: live tensor bytes on a CPU, where no allocator counts them, and resident memory."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within, counts the bytes of every tensor storage from the call that makes it until the last reference goes.

    Storages that exist on entry count too, but for garbage, which is collected first. Memory that a kernel uses inside
    one call is not a tensor and not seen.
    It slows each call down several times: use it on a step whose time does not matter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> LiveBytes:
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some modules warn about being looked at
            for thing in gc.get_objects():
                if issubclass(type(thing), torch.Tensor):
                    self._count(thing)
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_iter(result):
            if isinstance(made, torch.Tensor):
                self._count(made)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._storages[key]
            self.live_bytes -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def rss_bytes() -> int:
    """Resident memory of this process, libraries and all."""
    return int(psutil.Process().memory_info().rss)
