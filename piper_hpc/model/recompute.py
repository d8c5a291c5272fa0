"""Parts of a layer that are computed again in the backward instead of being kept (torch.utils.checkpoint)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

_reruns = 0


def is_rerun() -> bool:
    """Whether a layer's forward is running for the second time, in the backward: what it routes was counted before.

    A count of this process and no context variable: on a device, autograd has threads of its own.
    """
    return _reruns > 0


@contextmanager
def _rerun() -> Iterator[None]:
    global _reruns
    _reruns += 1
    try:
        yield
    finally:
        _reruns -= 1


def kept(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, with everything kept for the backward that autograd asks for."""
    return function(*inputs)


def again(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only the inputs are kept: the backward runs it again, up to what it needs last."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def again_whole(function: Callable[..., Any], *inputs: Any) -> Any:
    """`again` with `is_rerun` true meanwhile, and to the end: no collective is left half done."""
    with set_checkpoint_early_stop(False):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _rerun()
