"""Views of the record beside it. The run's folder is the truth; a tracker only shows it elsewhere."""

from piper_hpc.tracking.base import TRACKERS, NoTracker, Tracker, flatten, make

__all__ = ["TRACKERS", "NoTracker", "Tracker", "flatten", "make"]
