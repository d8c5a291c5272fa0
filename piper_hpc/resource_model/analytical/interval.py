"""90 % intervals of a step's terms, by propagating the interval of every constant, one constant at a time."""

from __future__ import annotations

import math
from dataclasses import replace

from piper_hpc.resource_model.analytical.step import Step, stepper
from piper_hpc.resource_model.extrapolation import growth, tier_beyond
from piper_hpc.spec import ClusterSpec, Efficiency, Execution, Layout, ModelSpec, Workload


def half_widths(
    step: Step, model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload, execution: Execution
) -> dict[str, float]:
    """Half of the 90 % interval of every term and of `step_time_s`, in seconds.

    First-order propagation of errors, by one re-evaluation a constant: constants are off independently, so that their
    effects combine as the root of the sum of squares (Cost of the eager engine does the same with curves); the
    spread of the fit, `model`, moves every term and the step as one.
    """
    assert cluster.accelerator is not None, "stepper refuses a cluster without one"
    efficiency = cluster.accelerator.efficiency
    base = _seconds(step)
    squares = {key: (efficiency.spread.get("model", 0.0) * seconds) ** 2 for key, seconds in base.items()}
    for constant, known in efficiency.spread.items():
        spread = _beyond_measured(known, constant, cluster) if constant in efficiency.measured else known
        if constant == "model" or constant in efficiency.tied or not spread:
            continue
        perturbed = _perturbed(efficiency, constant, spread)
        for other_constant, same_as in efficiency.tied.items():
            if same_as == constant:
                perturbed = _perturbed(perturbed, other_constant, spread)
        accelerator = replace(cluster.accelerator, efficiency=perturbed)
        other = stepper(model, replace(cluster, accelerator=accelerator), layout, workload, execution).evaluate()
        for key, seconds in _seconds(other).items():
            squares[key] += (seconds - base[key]) ** 2
    return {key: math.sqrt(square) for key, square in squares.items()}


def _beyond_measured(spread: float, constant: str, cluster: ClusterSpec) -> float:
    """The spread of a measured constant, which is larger for a link on more nodes than it was measured on."""
    beyond = tier_beyond(cluster, constant.removeprefix("link.")) if constant.startswith("link.") else 1.0
    return (1 + spread) * growth(beyond) - 1 if beyond > 1 else spread


def _seconds(step: Step) -> dict[str, float]:
    return {name: float(seconds) for name, seconds in step.terms.items()} | {"step_time_s": float(step.step_time_s)}


def _perturbed(efficiency: Efficiency, constant: str, spread: float) -> Efficiency:
    """With one constant lower by its spread: a share so that time grows, a time so that it shrinks."""
    if constant.startswith("link."):
        tier = constant.removeprefix("link.")
        return replace(efficiency, link={**efficiency.link, tier: efficiency.link[tier] / (1 + spread)})
    return replace(efficiency, **{constant: getattr(efficiency, constant) / (1 + spread)})
