"""Experiment trackers (wandb): optional copies of a run's metrics. The run's folder stays the only source."""

from piper_hpc.tracking.base import NoTracker, Tracker
from piper_hpc.tracking.factory import TRACKERS, make
from piper_hpc.tracking.guard import GuardedTracker
from piper_hpc.tracking.rows import flatten, with_prediction

__all__ = ["TRACKERS", "GuardedTracker", "NoTracker", "Tracker", "flatten", "make", "with_prediction"]
