"""From a model, a layout and a cluster to the time of a step by term, memory and MFU: the engine that prices it."""

from __future__ import annotations

from piper_hpc.resource_model import analytical, eager
from piper_hpc.resource_model.schedule import Timeline
from piper_hpc.spec import EXECUTIONS, ClusterSpec, Execution, Layout, ModelSpec, Prediction, Workload


def predict(
    model: ModelSpec,
    cluster: ClusterSpec,
    layout: Layout,
    workload: Workload,
    execution: Execution = EXECUTIONS["piper"],
) -> Prediction:
    """Time by term, memory by stage and MFU of one step of `workload` under `layout` on `cluster`.

    execution: this project's own executor, priced by measured curves (`eager`), or one with fused kernels, priced by
    what the cluster's accelerator is known to reach (`analytical`). Raises ResourceModelError for a layout that has no
    such step, and for a cluster without a peak rate or without any link where the layout needs one.
    """
    if execution.name == "piper":
        return eager.predict(model, cluster, layout, workload)
    return analytical.predict(model, cluster, layout, workload, execution)


def timeline(
    model: ModelSpec,
    cluster: ClusterSpec,
    layout: Layout,
    workload: Workload,
    execution: Execution = EXECUTIONS["piper"],
) -> Timeline:
    """The pipeline of one step, action by action, as `predict` plays it; ranks are pipeline ranks, 0 .. pp - 1.

    It ends with the last backward: gradient reduction and optimizer follow. Under this project's executor every rank
    has a device of its own, also where the cluster's share cores. Raises ResourceModelError as `predict` does, and for
    a step with too many actions.
    """
    if execution.name == "piper":
        return eager.timeline(model, cluster, layout, workload)
    return analytical.timeline(model, cluster, layout, workload, execution)
