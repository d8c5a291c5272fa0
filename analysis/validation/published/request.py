"""Request and Outcome: the input of a prediction for a published run, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from piper_hpc.spec import Execution, Layout, ModelSpec, Routing


class Refused(Exception):
    """A row or a run that cannot be modelled; the message says why, with the key, its value and the rule."""


@dataclass(frozen=True)
class Request:
    """One complete run: nothing is left open.

    global_batch: sequences a step. recipe: a name of `piper_hpc.spec.RECIPES`. framework: `megatron`, `fsdp`,
    `deepspeed`, `deepseek` or `piper`; method: the system's or method's own name, as printed. accelerator, cluster:
    names of files under conf/. single_layer: one transformer layer without embedding, head, gradient reduction and
    optimizer. assumed: what the filling rule took, by field, and why.
    """

    model: ModelSpec
    layout: Layout
    global_batch: int
    sequence: int
    gpus: int
    accelerator: str
    cluster: str
    recipe: str
    routing: Routing
    execution: Execution
    framework: str = "megatron"
    method: str = ""
    single_layer: bool = False
    assumed: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    @property
    def filled(self) -> dict[str, str]:
        """What the filling rule assumed, by field."""
        return dict(self.assumed)


@dataclass(frozen=True)
class Outcome:
    """What the resource model says of a Request.

    peak_memory_bytes: allocated, on the worst rank; reserved_bytes: with what the allocator holds, 0 where not
    modelled (then allocated stands for it, a lower bound). capacity_bytes: what one device may use. fitted_on: ids of
    all rows that any constant behind it saw.
    components, where the model has them, in seconds or bytes:
    `layer_forward_s`, `layer_backward_s` (one layer, recompute in the backward); `forward_s`, `backward_s`, `weight_s`,
    `overlapped_s`, `bubble_s`, `optimizer_s` (shares of a step: lone forwards, lone input and weight gradients, paired
    forward and backward); `states_bytes` (weights, gradients, optimizer), `activations_bytes`,
    `moe_layer_activation_bytes`.
    """

    step_time_s: float
    peak_memory_bytes: float
    capacity_bytes: float
    reserved_bytes: float = 0.0
    components: dict[str, float] = field(default_factory=dict)
    fitted_on: tuple[str, ...] = ()
    half_width_s: Callable[[], float] | None = field(default=None, compare=False)

    @property
    def fits(self) -> bool:
        """Whether the worst rank stays within its device's memory."""
        return max(self.peak_memory_bytes, self.reserved_bytes) <= self.capacity_bytes


Predictor = Callable[[Request], Outcome]
"""Answers a Request, or raises Refused with the reason."""
