"""What an operator is to a micro-benchmark: a call, its work, and whether it was right; and how it is kept cold.

A step comes back to a tensor long after the caches have lost it. So calls go round a ring of equal operators, each
with inputs of its own, and outputs are kept for a round: memory is as cold between two calls as it is in a step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import torch

from piper_hpc.microbench.shapes import MIB

COLD_CPU_BYTES = 16 * MIB
COLD_GPU_BYTES = 256 * MIB
"""What a ring touches in a round: several times the caches of a core, or the L2 of a GPU."""

LONGEST_RING = 64


@dataclass(frozen=True)
class Operator:
    """A call that is timed: `work` in `unit` a call, and `correct`, the result of a check made on a first call.

    bytes: of the tensors that a call reads and writes; 0 where they do not matter.
    """

    unit: str
    work: float
    call: Callable[[], object]
    correct: bool
    bytes: int = 0


def bytes_of(*tensors: torch.Tensor) -> int:
    """Of all these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def close_to(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors of one shape are equal up to rounding in `dtype`, relative to the largest value."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    error = (actual.double() - expected.double()).abs().max()
    return bool(error <= tolerance * expected.double().abs().max())


def ring(make: Callable[[], Operator], device: torch.device) -> Operator:
    """What `make` builds, so many times over that each call finds its memory cold."""
    first = make()
    cold_bytes = COLD_CPU_BYTES if device.type == "cpu" else COLD_GPU_BYTES
    copies = min(LONGEST_RING, -(-cold_bytes // first.bytes)) if first.bytes else 1
    if copies == 1:
        return first
    calls = cycle([first.call, *(make().call for _ in range(copies - 1))])
    outputs: deque[object] = deque(maxlen=copies)
    return replace(first, call=lambda: outputs.append(next(calls)()))
