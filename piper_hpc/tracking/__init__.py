"""Experiment trackers (wandb): optional copies of a run's metrics. The run's folder stays the only source."""

from piper_hpc.tracking.base import TRACKERS, NoTracker, Tracker, make
from piper_hpc.tracking.rows import flatten

__all__ = ["TRACKERS", "NoTracker", "Tracker", "flatten", "make"]
