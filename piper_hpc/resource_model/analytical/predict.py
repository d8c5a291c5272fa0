"""The prediction of the analytical engine: the closed form, put on the schedule's timeline, with its 90 % intervals."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from piper_hpc.resource_model import extrapolation, schedule
from piper_hpc.resource_model.analytical.device import TILE
from piper_hpc.resource_model.analytical.evidence import evidence
from piper_hpc.resource_model.analytical.interval import half_widths
from piper_hpc.resource_model.analytical.shapes import Shapes
from piper_hpc.resource_model.analytical.step import Step, stepper
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.flops import flops_per_token
from piper_hpc.resource_model.prediction import assemble, ratio_interval
from piper_hpc.resource_model.rules import check_layout
from piper_hpc.spec import (
    TERMS,
    ClusterSpec,
    Degrees,
    Execution,
    Layout,
    ModelSpec,
    Prediction,
    Workload,
)
from piper_hpc.spec.schedules import stage_of

MOST_ACTIONS = 400_000
"""Actions of a step that are still simulated one by one, about two seconds; beyond, the closed form stands."""


SHORT_TOKENS = 1024
"""Sequences below have no measured attention behind them."""


def predict(
    model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload, execution: Execution
) -> Prediction:
    """Time by term, memory by stage and MFU of one step of `workload` under `layout`, as `execution` carries it out.

    Intervals carry the spread of every constant and of the fit. Raises ResourceModelError for a layout that has no
    such step, and for a cluster whose device or links are not known.
    """
    check_layout(model, cluster, layout, workload)
    stepping = stepper(model, cluster, layout, workload, execution)
    step = stepping.evaluate()
    notes = [*stepping.network.links.notes, *_beyond(stepping.shapes, cluster), *extrapolation.notes(cluster)]
    timeline = simulate(step, layout, execution)
    terms = {name: float(step.terms.get(name, 0.0)) for name in TERMS}
    if timeline is None:
        notes.append("bubble: in closed form, the step has too many actions to be simulated one by one")
    elif layout.pp > 1:
        busy = max(timeline.busy_s)
        waits = timeline.p2p_s[timeline.busy_s.index(busy)]
        terms |= {"p2p_s": waits, "bubble_s": max(0.0, timeline.step_s - busy - waits)}
    step_time_s = sum(terms.values())
    half = half_widths(step, model, cluster, layout, workload, execution)
    intervals = {name: ratio_interval(seconds, half.get(name, 0.0)) for name, seconds in terms.items()}
    low, high = intervals["step_time_s"] = ratio_interval(step_time_s, half["step_time_s"])
    flops = flops_per_token(model, workload.sequence) * workload.tokens
    share = flops / (stepping.device.peak_flops * layout.ranks)
    memory = {kind: [int(size) for size in sizes] for kind, sizes in step.memory.items()}
    return assemble(
        model,
        layout,
        workload,
        terms=terms,
        mfu=share / step_time_s,
        memory=memory,
        bubble_fraction=terms["bubble_s"] / step_time_s,
        hidden={name: float(seconds) for name, seconds in step.hidden.items()},
        intervals=intervals
        | {"tokens_per_s": (workload.tokens / high, workload.tokens / low), "mfu": (share / high, share / low)},
        calibration=evidence(stepping.device, cluster, execution),
        notes=notes,
    )


def timeline(
    model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload, execution: Execution
) -> schedule.Timeline:
    """The pipeline of one step, action by action. Raises ResourceModelError for a step with too many actions."""
    step = stepper(model, cluster, layout, workload, execution).evaluate()
    played = simulate(step, layout, execution)
    if played is None:
        raise ResourceModelError(
            f"a step of {int(step.micro_batches)} micro-batches on {layout.pp} x {layout.vpp} stages has too many "
            "actions to be played one by one"
        )
    return played


def simulate(step: Step, layout: Degrees, execution: Execution) -> schedule.Timeline | None:
    """The step's pipeline played action by action; None where it has too many of them."""
    micro_batches = int(step.micro_batches)
    if layout.pp * layout.vpp * micro_batches * 3 > MOST_ACTIONS:
        return None
    stages = layout.pp * layout.vpp
    of_stage = {
        stage_of(layout.schedule, rank, chunk, layout.pp): times
        for rank, chunks in enumerate(step.ranks)
        for chunk, times in enumerate(chunks)
    }
    message = [float(step.message_s)] * (stages - 1)
    return schedule.simulate(
        layout.schedule,
        layout.pp,
        micro_batches,
        [float(of_stage[stage].forward) for stage in range(stages)],
        [float(of_stage[stage].backward) for stage in range(stages)],
        weight_s=[float(of_stage[stage].weight_grad) for stage in range(stages)],
        send_forward_s=message,
        send_backward_s=message,
        blocking=not execution.overlap_p2p,
    )


def _beyond(shapes: Shapes, cluster: ClusterSpec) -> Iterator[str]:
    """Where a workload leaves what the constants were fitted on or read at."""
    if cluster.accelerator is not None and not cluster.accelerator.published:
        yield (
            f"device '{cluster.accelerator.name}': its rates were measured; no published run of such a device stands "
            "behind the kernels and the overlap that are assumed"
        )
    if shapes.workload.sequence < SHORT_TOKENS:
        yield (
            f"sequence={shapes.workload.sequence}: attention's share of the peak is that of 4096 tokens and more; "
            "short ones reach less"
        )
    rows = float(shapes.rows / np.maximum(shapes.experts_per_rank, 1)) if shapes.model.experts else float("inf")
    if rows < TILE[0]:
        yield f"experts: {rows:.0f} rows each, less than a tile of {TILE[0]}: no fitted run had products so small"
