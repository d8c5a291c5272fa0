"""Checks that both engines make of a layout: the rules of spec.rules, and the ranks of the cluster."""

from __future__ import annotations

from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import ClusterSpec, Layout, ModelSpec, Workload
from piper_hpc.spec.rules import layout_problems


def check_layout(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> None:
    """Raises ResourceModelError with the first rule that `layout` breaks; see spec.rules for the rules."""
    if layout.ranks > cluster.ranks:
        raise ResourceModelError(
            f"layout: pp * dp * ep * etp = {layout.ranks} ranks, cluster '{cluster.name}' has {cluster.ranks}"
        )
    problem = next(layout_problems(model, layout, workload), None)
    if problem is not None:
        raise ResourceModelError(str(problem))
