"""All layouts that fit a cluster, ranked by what the resource model predicts of them."""

from piper_hpc.planner.axes import Axes
from piper_hpc.planner.search import Plan, plan

__all__ = ["Axes", "Plan", "plan"]
