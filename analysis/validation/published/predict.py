"""The resource model's answer to a Request: the predictor behind `python -m analysis.validate published`."""

from __future__ import annotations

from functools import lru_cache

from analysis.validation.published.request import Outcome, Refused, Request
from piper_hpc.cluster import accelerator, preset
from piper_hpc.resource_model import analytical
from piper_hpc.resource_model.analytical import memory
from piper_hpc.spec import RECIPES, Accelerator, Workload


@lru_cache(maxsize=64)
def _device(name: str) -> Accelerator:
    return accelerator.load(name)


def predict(request: Request, device: Accelerator | None = None) -> Outcome:
    """Step time, memory and components of one request; `device` stands in for the one that it names.

    Raises Refused where the model does not cover it.
    """
    try:
        device = device or _device(request.accelerator)
        cluster = preset.cluster(request.cluster, request.gpus, device)
        workload = Workload(request.global_batch, request.sequence, RECIPES[request.recipe], request.routing)
        stepper = analytical.stepper(request.model, cluster, request.layout, workload, request.execution)
        step = stepper.evaluate()
        components = _components(stepper, step)
    except (ValueError, LookupError, ArithmeticError) as error:  # ResourceModelError is a ValueError
        raise Refused(str(error)) from error
    return Outcome(
        step_time_s=float(step.step_time_s),
        # Published peaks are those of tensors; the rest is charged to the device.
        peak_memory_bytes=float(step.peak_bytes) - device.efficiency.framework_bytes,
        capacity_bytes=device.memory_bytes - device.efficiency.framework_bytes,
        components=components,
        fitted_on=device.efficiency.fitted_on,
        half_width_s=lambda: analytical.half_widths(
            step, request.model, cluster, request.layout, workload, request.execution
        )["step_time_s"],
    )


def _components(stepper: analytical.Stepper, step: analytical.Step) -> dict[str, float]:
    """Seconds of one layer and of a step's parts, and bytes of states and activations on the fullest rank."""
    forward_s, backward_s = (float(seconds) for seconds in stepper.layer_s)
    peaks = [sum(float(kinds[rank]) for kinds in step.memory.values()) for rank in range(len(step.ranks))]
    worst = peaks.index(max(peaks))
    states = sum(float(step.memory[kind][worst]) for kind in ("parameters", "gradients", "optimizer"))
    found = {
        "layer_forward_s": forward_s,
        "layer_backward_s": backward_s,
        "bubble_s": float(step.terms["bubble_s"]),
        "optimizer_s": float(step.terms["optimizer_s"]),
        "states_bytes": states,
        "activations_bytes": float(step.memory["activations"][worst]),
    }
    found |= _by_kind(stepper, step)
    if stepper.shapes.model.moe_layers:
        found["moe_layer_activation_bytes"] = float(memory.moe_bytes(stepper.shapes, stepper.execution))
    return found


def _by_kind(stepper: analytical.Stepper, step: analytical.Step) -> dict[str, float]:
    """Seconds of the first rank's actions by kind, off the simulated timeline: lone ones, and pairs that overlap."""
    layout = stepper.layout
    if layout.schedule != "dualpipev":
        return {}
    timeline = analytical.simulate(step, layout, stepper.execution)
    if timeline is None:
        return {}
    names = {"F": "forward_s", "B": "backward_s", "I": "backward_s", "W": "weight_s", "FB": "overlapped_s"}
    seconds = dict.fromkeys(names.values(), 0.0)
    for slot in timeline.timed_actions[0]:
        seconds[names[slot.kind]] += slot.end_s - slot.start_s
    return seconds | {"bubble_s": timeline.bubble_s[0]}
