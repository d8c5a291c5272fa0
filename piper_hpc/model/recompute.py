"""Parts of a layer that are computed again in the backward instead of being kept (torch.utils.checkpoint)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


class Rerun:
    """Whether a forward is running for the second time, in the backward: what it routes and sends was counted before.

    A flag that rank's modules share, and no context variable: on a device, autograd has threads of its own.
    """

    def __init__(self) -> None:
        self.active = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Active within."""
        self.active = True
        try:
            yield
        finally:
            self.active = False


def kept(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, with everything kept for the backward that autograd asks for."""
    return function(*inputs)


def again(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which only the inputs are kept: the backward runs it again, up to what it needs last."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def again_whole(rerun: Rerun, function: Callable[..., Any], *inputs: Any) -> Any:
    """`again`, but to the end, so that no collective is left half done, with `rerun` active meanwhile."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), rerun()

    with set_checkpoint_early_stop(False):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
